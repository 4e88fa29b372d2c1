"""What there is to say about a conversion, gathered on the way."""

from dataclasses import dataclass, field

from common.errors import StudyError


@dataclass(frozen=True)
class Remarks:
    """Doubts about a header; none of them says who or when.

    Attributes
    ----------
    reinterpretations : list of str
        Header values taken to mean something else than they say.
    warnings : list of str
        Contradictions that do not stop the conversion.

    """

    reinterpretations: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def refuse_reinterpretations(remarks: Remarks) -> None:
    """Demand a header that needs no reinterpretation (`--strict`).

    Raises
    ------
    StudyError
        There is one; the message holds all.
    """
    if remarks.reinterpretations:
        raise StudyError(
            f"refused by --strict: {'; '.join(remarks.reinterpretations)}: "
            "correct the header, or run without --strict"
        )
