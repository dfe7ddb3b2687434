"""Images whose every detail is known: drawn cats and dogs, animals beside signs, and animals that a shortcut
gives away, with exact counterfactuals; and real digits."""

from typing import TYPE_CHECKING

from circuitvit._lazy import lazy

if TYPE_CHECKING:
    from circuitvit.datasets import catdog as catdog
    from circuitvit.datasets import digits as digits
    from circuitvit.datasets import factors as factors
    from circuitvit.datasets import shortcuts as shortcuts
    from circuitvit.datasets import signs as signs
else:
    __getattr__, __dir__, _ = lazy(__name__, {}, submodules="catdog digits factors shortcuts signs")
