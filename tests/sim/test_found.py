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


def test_an_agent_that_did_not_hear_that_its_image_is_dropped_keeps_no_later_attempt_out():
    """The next attempt could not be recorded; then nobody remembered the image, and its agent stood by no more."""
    mute = Fault("mute dest agent", point="dest.PREPARED.written", for_ms=20.0)
    full = Fault("fill dest journal", point="source.AbortDestination.after", for_ms=60.0)
    for seed in range(10):  # before it was mended, all of these
        outcome = simulate(seed, options=Options(faults=(mute, full)))
        assert not outcome.violation, f"seed {seed}: {outcome.violation}"
        assert outcome.coverage["fault fill dest journal"] == 1
