"""What can be done about a model that reads where it should look: attacks and defences, on one table."""

from circuitvit.defences.attack import TypographicAttack, typographic_attack
from circuitvit.defences.silenced import HeadDefence, attention_heads

__all__ = ["HeadDefence", "TypographicAttack", "attention_heads", "typographic_attack"]
