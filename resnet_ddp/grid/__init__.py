"""The grid: models times seeds, by one recipe on one data set. Nothing here imports torch.

cells.py        which runs the grid has, and in which order they are taken
states.py       how each of them stands, from its directory alone
slots.py        what this machine can train at a time
supervisor.py   runs them all
picture.py      them as a table; display.py: while they run
local.py        the commands
"""
