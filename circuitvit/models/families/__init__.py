"""Model families: each one short file that says where its modules keep their parts. Nothing else knows
that.
"""

from circuitvit.models.families.family import Family

__all__ = ["Family"]
