"""The command line: starts processes and composes them. No other package imports this one.

cli          `headrace` itself: parses, dispatches, turns errors into one line and an exit code
settings     what several commands share: --set, and flags as settings
serve        `headrace serve`: one role in this process
up           `headrace up`: a whole cluster on this machine
plan         which processes a cluster consists of: a pure function
cores        which cores each of them gets: a pure function
prepare      model and kernels, made ready once before the processes start
child        one process: its announcement, its last log lines, its end
supervisor   keeps them running, restarts what dies, drains in order
status_view  tells the user: a live table on a terminal, lines elsewhere
model        `headrace model`: fetch or convert a model ahead of time
cache        `headrace cache`: what the caches of a running cluster hold, and what to do about it
cache_tables     what it prints
cache_warm       `headrace cache warm`: prompts computed ahead of time
cache_watch      `headrace cache watch`: stats that refresh
index_watch      `headrace cache watch --events`: what nodes tell the index
doctor       `headrace doctor`: is this machine fit to run it
probe        checks that need their own process, because they import much or may crash

Nothing here imports torch: what needs it runs in a process of its own.
"""
