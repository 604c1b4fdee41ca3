"""The commands of a session by hand: up, migrate, fault, status, resolve, down.

Rule 1: as in commands.py: arguments in, one function of another module, tables or one JSON object out.
Rule 2: nothing is kept here between two commands: the session's keeper has everything (standing/sessions.py).
"""
# ruff: noqa: PLC0415 - what a command needs is imported when it runs

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli.options import RUNS, HostsKind, Json, Out, Overrides, ScenarioPath, Seed, SessionDir, unnamed
from testbed.cli.output import leave_with, print_json, print_table, told
from testbed.errors import UsageError

if TYPE_CHECKING:
    from testbed.interrupt import Interrupt
    from testbed.standing.sessions import Conversation, StandingSession

fault_app = typer.Typer(
    help="Break something in a session or heal it: add, heal, list.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Adds the commands to `ballast`."""
    for command in (up, migrate, status, resolve, down):
        app.command()(command)
    app.add_typer(fault_app, name="fault")


def up(
    scenario: ScenarioPath,
    *,
    overrides: Overrides = None,
    hosts: HostsKind = None,
    out: Out = RUNS,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Start a scenario's hosts and guest, and leave them standing.

    For `migrate`, `fault`, `status` and `down`, by hand (docs/sessions.md).
    """
    with told():
        from testbed.interrupt import Interrupt
        from testbed.machine.capabilities import require
        from testbed.report.session_tables import status_table
        from testbed.run.progress import display
        from testbed.scenario.file import load
        from testbed.standing import sessions

        chosen = load(scenario, overrides or (), unnamed(seed, hosts))
        require(chosen)
        with Interrupt() as interrupt, display() as shown:
            beginning = sessions.Beginning(chosen, out)
            interrupt.listen(beginning.interrupt)
            session = beginning.wait(shown.begin(chosen.name))
        seen = sessions.ask(session, {"command": "status"})
        if as_json:
            print_json(seen)
            return
        print_table(status_table(seen))
        typer.echo("next: ballast migrate; ballast fault add KIND KEY=VALUE; ballast down")


def migrate(
    *,
    session_dir: SessionDir = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="HOST", help="a, b or c; unless said, the first that has no guest."),
    ] = None,
    overrides: Overrides = None,
    expect: Annotated[
        str,
        typer.Option(
            "--expect", help="The outcome that is right: with a fault it may be failed or cancelled."
        ),
    ] = "completed",
    as_json: Json = False,
) -> None:
    """Migrate the guest of a session once, and judge that.

    The guest runs on where it is then.
    """
    with told():
        from testbed.interrupt import Interrupt
        from testbed.run.progress import display
        from testbed.standing import sessions

        session = sessions.choose(session_dir)
        request = {"command": "migrate", "to": to, "overrides": overrides or [], "expect": expect}
        with Interrupt() as interrupt, display() as shown:
            conversation = sessions.Conversation(session)
            _cancel_at_first_press(interrupt, session, conversation)
            answer = conversation.ask(request, shown.begin(f"{session.scenario}, migration by hand"))
        result, exit_code = _judged_leg(session.run_dir)
        if as_json:
            print_json({**answer, "result": result.to_dict()})
        else:
            from testbed.report.tables import run_report

            print_table(run_report(result))
        leave_with([exit_code])


@fault_app.command("add")
def fault_add(
    kind: Annotated[
        str, typer.Argument(help="partition, loss, rate, delay, kill, pause, …: see docs/faults/.")
    ],
    parameters: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="As in [[fault]]: host=b, rate=100Mbit/s."),
    ] = None,
    *,
    session_dir: SessionDir = None,
    as_json: Json = False,
) -> None:
    """Bring a fault into force now; it stays until it is healed or the session ends."""
    chosen = dict(_parameter(text) for text in parameters or ())
    answer = _asked(
        session_dir, {"command": "fault_add", "kind": kind, "parameters": chosen}, as_json=as_json
    )
    if not as_json:
        number = answer["fault"]["id"]
        typer.echo(f"fault {number} ({kind}) is in force; ballast fault heal {number}")


@fault_app.command("heal")
def fault_heal(
    number: Annotated[int, typer.Argument(metavar="ID", help="As `ballast fault list` says.")],
    *,
    session_dir: SessionDir = None,
    as_json: Json = False,
) -> None:
    """Undo a fault."""
    answer = _asked(session_dir, {"command": "fault_heal", "id": number}, as_json=as_json)
    if not as_json:
        counted = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in answer["counted"].items())
        typer.echo(f"fault {number} ({answer['fault']['kind']}) is healed{f': {counted}' if counted else ''}")


@fault_app.command("list")
def fault_list(*, session_dir: SessionDir = None, as_json: Json = False) -> None:
    """Show the faults in force."""
    with told():
        from testbed.report.session_tables import faults_table
        from testbed.standing import sessions

        faults = sessions.ask(sessions.choose(session_dir), {"command": "status"})["faults"]
        if as_json:
            print_json({"schema": 1, "faults": faults})
        else:
            print_table(faults_table(faults))


def status(*, session_dir: SessionDir = None, as_json: Json = False) -> None:
    """Show a session's hosts, its guest, and the faults in force."""
    with told():
        from testbed.report.session_tables import status_table
        from testbed.standing import sessions

        seen = sessions.ask(sessions.choose(session_dir), {"command": "status"})
        if as_json:
            print_json({"schema": 1, **seen})
        else:
            print_table(status_table(seen))


def resolve(
    session_dir: Annotated[
        Path, typer.Argument(metavar="DIR", help="Run directory of the session, as `ballast up` told it.")
    ],
    *,
    dead: Annotated[
        str,
        typer.Option("--dead", metavar="source|dest", help="Who will never return, of the newest migration."),
    ],
    fenced: Annotated[
        str,
        typer.Option(
            "--fenced",
            metavar="REASON",
            help="Why it is certain that a dead destination's guest does not run, where its journal cannot be had.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """End a migration whose other side will never return.

    Only where the journals prove it safe; refused otherwise (docs/safety.md).
    """
    answer = _asked(session_dir, {"command": "resolve", "dead": dead, "fenced": fenced}, as_json=as_json)
    if not as_json:
        typer.echo(
            f"attempt {answer['attempt']} is {answer['state']} at host {answer['host']}: {answer['reason']}"
        )


def down(*, session_dir: SessionDir = None, as_json: Json = False) -> None:
    """End a session, and judge all that was recorded.

    Heals every fault and checks the guest before.
    """
    with told():
        from testbed.checkers import judge
        from testbed.record.run_record import load
        from testbed.report.tables import findings_table
        from testbed.standing import sessions

        session = sessions.choose(session_dir)
        answer = sessions.ask(session, {"command": "down"})
        if as_json:
            print_json({"schema": 1, **answer})
        elif not answer["legs"] and not answer["exit_code"]:
            typer.echo("the session is down; no migration was made, so there is nothing to judge")
        else:
            print_table(findings_table(judge(load(session.run_dir))))
            typer.echo(f"recorded in {session.run_dir}")
        leave_with([int(answer["exit_code"])])


def _asked(session_dir: Path | None, request: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    with told():
        from testbed.standing import sessions

        answer = sessions.ask(sessions.choose(session_dir), request)
        if as_json:
            print_json({"schema": 1, **answer})
    return answer


def _parameter(text: str) -> tuple[str, object]:
    from testbed.scenario.file import split_override
    from testbed.scenario.leg_keys import ORIGINS

    with told():
        try:
            key, value = split_override(text)
        except UsageError:
            raise UsageError(f"{text!r} is no parameter: write KEY=VALUE, as in loss=1%") from None
    # Hosts have short names in every table; a fault's own are source, dest and third.
    return key, ORIGINS.get(value, value) if key == "host" and isinstance(value, str) else value


def _cancel_at_first_press(
    interrupt: Interrupt, session: StandingSession, conversation: Conversation
) -> None:
    """Ctrl-C cancels the migration and waits for its outcome; whoever presses again stops waiting."""
    from testbed.errors import TestbedError
    from testbed.standing import sessions

    def pressed() -> None:
        if interrupt.hurried:
            conversation.hang_up()
            return
        try:
            sessions.ask(session, {"command": "cancel"})
        except TestbedError as error:
            typer.echo(f"ballast: {error}", err=True)

    interrupt.listen(pressed)


def _judged_leg(run_dir: Path) -> tuple[Any, int]:
    """The newest migration of a session, as a run of its own."""
    from testbed.checkers import judge
    from testbed.record.leg_views import legs_of
    from testbed.record.run_record import load
    from testbed.report.result import build

    view = legs_of(load(run_dir))[-1]
    judgement = judge(view)
    return build(view, judgement), judgement.exit_code
