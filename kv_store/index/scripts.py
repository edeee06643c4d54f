"""The Lua scripts: every write to the index, and every read whose answer could be large.

Each touches the keys of one shard only. What is read has a length cap, because anybody with access to the server may have
written it; a key of another type counts as absent and is replaced when it is next written. Sent with EVAL, so a
restarted server needs no loading; all commands are common to Redis 7 and Valkey 8.
"""

from dataclasses import dataclass

from kv_store.index.places import MAX_PLACES, MAX_VALUE_BYTES, PLACE_BYTES, VERSION

WRITTEN = 1
LOST = -1
"""The record is not there: it has expired, or the server has lost its data."""

SUPERSEDED = -2
"""The record is of another life of this worker."""


@dataclass(frozen=True, slots=True)
class Script:
    text: str

    def call(self, keys: list[bytes], arguments: list[bytes | int]) -> tuple[bytes | str | int, ...]:
        """The command that runs it."""
        return ("EVAL", self.text, len(keys), *keys, *arguments)


_OTHERS = f"""
local function others(key, life)
  local value = redis.pcall('GETRANGE', key, 0, {MAX_VALUE_BYTES})
  if type(value) ~= 'string' then redis.call('DEL', key) return '' end
  local size = #value
  if size < 1 or string.byte(value, 1) ~= {VERSION} or size > {MAX_VALUE_BYTES} or (size - 1) % {PLACE_BYTES} ~= 0 then
    return ''
  end
  local kept = ''
  for at = 2, size, {PLACE_BYTES} do
    if string.sub(value, at, at + 3) ~= life then kept = kept .. string.sub(value, at, at + {PLACE_BYTES - 1}) end
  end
  return kept
end
local function keep(key, places)
  if places == '' then redis.call('DEL', key) else redis.call('SET', key, string.char({VERSION}) .. places) end
end
"""

_FENCE = f"""
local record = redis.pcall('GET', KEYS[1])
if type(record) ~= 'string' then return {{{LOST}}} end
if string.sub(record, 1, #ARGV[1]) ~= ARGV[1] then return {{{SUPERSEDED}}} end
"""

FETCH = Script(
    """
local found = {}
for i, key in ipairs(KEYS) do
  local value = redis.pcall('GETRANGE', key, 0, ARGV[1])
  if type(value) ~= 'string' then value = '' end
  if value == '' and ARGV[2] == '1' then break end
  found[i] = value
end
return found
"""
)
"""KEYS to read. ARGV: most bytes of a value, less one; 1: only as far as the first that is missing. Returns the values."""

ALLOT = Script(
    """
local last = redis.pcall('GET', KEYS[1])
last = type(last) == 'string' and tonumber(last) or 0
local now = tonumber(redis.call('TIME')[1])
local kind = redis.call('TYPE', KEYS[2]).ok
if kind ~= 'hash' and kind ~= 'none' then redis.call('DEL', KEYS[2]) end
local life = now
if last >= now and last < 4294967295 then life = last + 1 end
while redis.call('HEXISTS', KEYS[2], string.format('%.0f', life)) == 1 do life = life + 1 end
redis.call('SET', KEYS[1], string.format('%.0f', life))
return life
"""
)
"""KEYS: last life, hash of lives. Returns the new life, which is not in the hash yet: higher than all before and, by way of the server's
clock, than those that a server gave out before it lost its data."""

BEAT = Script(
    "#!lua flags=allow-oom\n"
    + _FENCE
    + f"""
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {{{WRITTEN}}}
"""
)
"""KEYS: record. ARGV: fence, new record, its TTL in milliseconds. A server without room takes it
too: its other entries are as good as ever. Returns WRITTEN, LOST or SUPERSEDED in a list."""

PUBLISH = Script(
    _OTHERS
    + _FENCE
    + f"""
local seconds = tonumber(redis.call('TIME')[1])
local now = ''
for _ = 1, 4 do now = now .. string.char(seconds % 256) seconds = math.floor(seconds / 256) end
local crowded = 0
for i = 3, #ARGV do
  local key, bucket, place = KEYS[2 * i - 4], KEYS[2 * i - 3], ARGV[i]
  local places, address = others(key, ARGV[2]), string.sub(key, -16)
  if place ~= '' and #places >= {MAX_PLACES * PLACE_BYTES} then
    place = ''
    crowded = crowded + 1
  end
  if place == '' then
    keep(key, places)
    redis.pcall('SREM', bucket, address)
  else
    keep(key, places .. place .. now)
    if type(redis.pcall('SADD', bucket, address)) ~= 'number' then
      redis.call('DEL', bucket)
      redis.call('SADD', bucket, address)
    end
  end
end
return {{{WRITTEN}, crowded}}
"""
)
"""KEYS: record, then entry and bucket of each chunk. ARGV: fence, life (packed), then what is published of each chunk, empty
to withdraw it. Returns {WRITTEN, how many entries had no room left}, or LOST or SUPERSEDED in a list."""

ANNOUNCE = Script(
    _FENCE
    + f"""
if type(redis.pcall('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', 'e', ARGV[3])) ~= 'string' then
  redis.call('DEL', KEYS[2])
  redis.call('XADD', KEYS[2], '*', 'e', ARGV[3])
end
return {{{WRITTEN}}}
"""
)
"""KEYS: record, stream. ARGV: fence, about how many events are kept, event. Returns like BEAT."""

EVENTS = Script(
    """
local found = {}
local read = redis.pcall('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
if read.err then return found end
local limit = tonumber(ARGV[3])
for _, entry in ipairs(read) do
  local body = entry[2][2]
  if #entry[2] ~= 2 or #body > limit then body = '' end
  limit = limit - #body
  found[#found + 1] = {entry[1], body}
end
return found
"""
)
"""KEYS: stream. ARGV: after which id ("(id"), how many, how many bytes in all. Returns {id, event}; event is empty where it was too large."""

LIVES = Script(
    """
local size = redis.pcall('HLEN', KEYS[1])
if type(size) ~= 'number' then return {0} end
local found = {size}
local fields = size <= tonumber(ARGV[1]) and redis.call('HKEYS', KEYS[1])
  or redis.call('HRANDFIELD', KEYS[1], ARGV[1])
if size > tonumber(ARGV[1]) then
  for i = 3, #ARGV do fields[#fields + 1] = ARGV[i] end
end
for _, field in ipairs(fields) do
  local length = redis.call('HSTRLEN', KEYS[1], field)
  if #field > 10 or length == 0 or length > tonumber(ARGV[2]) then
    redis.call('HDEL', KEYS[1], field)
  else
    found[#found + 1] = {field, redis.call('HGET', KEYS[1], field)}
  end
end
return found
"""
)
"""KEYS: hash of lives. ARGV: most lives, most bytes of an Owner, lives that are wanted in any case. Returns how many there are, then
{life, Owner} of all, or of a sample where there are more than that many; what cannot be one is deleted."""

BUCKET = Script(
    """
local found = {}
local members = redis.pcall('SRANDMEMBER', KEYS[1], ARGV[1])
if members.err then redis.call('DEL', KEYS[1]) return found end
for _, member in ipairs(members) do
  if #member == 16 then found[#found + 1] = member else redis.call('SREM', KEYS[1], member) end
end
return found
"""
)
"""KEYS: bucket. ARGV: how many. Returns addresses; what cannot be one is deleted."""

FENCE_OFF = Script(
    """
local record = redis.pcall('GET', KEYS[1])
if type(record) ~= 'string' or string.sub(record, 1, #ARGV[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""
)
"""KEYS: record. ARGV: fence of a life that is over: it writes nothing in this shard any more."""

SWEEP = Script(
    _OTHERS
    + """
local record = redis.pcall('GET', KEYS[1])
if type(record) == 'string' and string.sub(record, 1, #ARGV[1]) == ARGV[1] then return {0, 1} end
for i = 3, #KEYS do
  keep(KEYS[i], others(KEYS[i], ARGV[2]))
  redis.pcall('SREM', KEYS[2], string.sub(KEYS[i], -16))
end
return {#KEYS - 2, redis.call('EXISTS', KEYS[2])}
"""
)
"""KEYS: record, bucket, entries. ARGV: fence, life (packed). Takes a dead life's places out. Returns how
many, and whether there is more in the bucket; {0, 1}: it lives."""
