"""One uniform number for each (seed, output position): a hash, not a generator, so that there is no state to move.

    key     = mix(seed + GAMMA)
    uniform = mix(key + GAMMA * (position + 1)) >> 11, as a multiple of 2**-53

in 64-bit arithmetic that wraps around. This is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
Generators, 2014) read at an arbitrary place of its sequence; the seed is mixed first, so that neighbouring seeds do not
walk the same sequence a step apart.
"""

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR, _SECOND_FACTOR = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """In [0, 1), elementwise; the same on every machine."""
    keys = _mix(seeds + _GAMMA)
    return (_mix(keys + _GAMMA * (positions + np.uint64(1))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _FIRST_FACTOR
    state = (state ^ (state >> np.uint64(27))) * _SECOND_FACTOR
    return state ^ (state >> np.uint64(31))
