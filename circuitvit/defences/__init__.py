"""What can be done about a model that answers for the wrong reason: attacks, defences, repair, on tables."""

from circuitvit.defences.attack import TypographicAttack, typographic_attack
from circuitvit.defences.mended import Mended
from circuitvit.defences.mending import mend
from circuitvit.defences.silenced import HeadDefence, attention_heads

__all__ = ["HeadDefence", "Mended", "TypographicAttack", "attention_heads", "mend", "typographic_attack"]
