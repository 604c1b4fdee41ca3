"""What the simulator found: each stays found when the dice change, as its schedule is written down here."""

from testbed.sim.options import Fault, Options
from testbed.sim.simulation import simulate


def test_a_slow_guest_gets_its_pages_back_when_the_device_restarts_right_after_done():
    """DONE was not read yet when the node died; its next process showed STOP, and the pages stayed held."""
    crash = Fault("crash dest node", point="dest.ForgetAttempt.after", for_ms=1.0)
    options = Options(hint_mode="hold", hint_diligence=0.5, hint_wait_ms=30, faults=(crash,))
    for seed in range(20):  # before it was mended, seven of these
        outcome = simulate(seed, options=options)
        assert not outcome.violation, f"seed {seed}: {outcome.violation}"
        assert outcome.coverage["fault crash dest node"] == 1
