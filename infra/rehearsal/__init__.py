"""A GPU market that only pretends: what jobs ordered with a test key run on.

Nothing here can reach a real market. `market` is the door that renting and releasing go through,
`machine` what a rented machine does, `stage` where machines are played: threads of the process
that rented them.
"""

from infra.rehearsal.machine import Cue, Machine
from infra.rehearsal.market import Market
from infra.rehearsal.stage import Stage

__all__ = ["Cue", "Machine", "Market", "Stage"]
