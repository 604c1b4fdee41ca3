"""Who broke the migration protocol.

Rule 1: the class of the error says who is to blame: this process (Local) or what came from outside (Remote).
Rule 2: whatever a peer or a guest can send raises RemoteProtocolError, never an assert or a bare ValueError.
Rule 3: the facts go in as keywords, so that logs and tests read them without taking a sentence apart.
"""

from typing import Self


class ProtocolError(Exception):
    """Base of the two below; it names nobody to blame and therefore cannot be made itself.

    `facts` holds the figures given as keywords; they are also part of the text.
    """

    facts: dict[str, int | str]

    def __new__(cls, *_args: object, **_facts: object) -> Self:
        """Refuses to make the base class itself (TypeError)."""
        if cls is ProtocolError:
            raise TypeError("ProtocolError is abstract: raise LocalProtocolError or RemoteProtocolError")
        return super().__new__(cls)

    def __init__(self, message: str, **facts: int | str) -> None:
        super().__init__(message)
        self.facts = facts

    def __str__(self) -> str:
        message = str(self.args[0])
        if not self.facts:
            return message
        return f"{message} ({', '.join(f'{name}={value}' for name, value in self.facts.items())})"


class LocalProtocolError(ProtocolError):
    """This process asked for something illegal: a bug on our side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something illegal; its connection is not to be trusted further."""
