"""Circuits in a test suite: pin a model's circuit, so that no change of weights or code breaks it unseen.

    from circuitvit.testing import assert_faithful, assert_hypothesis

    def test_the_cat_circuit(circuit_model, circuit_task):
        circuit = cv.Circuit.load("cat_dog.json", circuit_model.graph)
        assert_faithful(circuit_model, circuit_task, circuit, at_least=0.85)

Every assertion returns what it looked at, and fails with an `AssertionError` that says what was found and
what was asked for. The pytest plugin (`circuitvit.testing.plugin`) comes with the package: fixtures
`circuit_model` and `circuit_task`, the marker `circuit`, and a section at the end of the summary.

For those who write scoring methods: `active_edges` finds by brute force which edges of a small model matter,
and `separation` says how well scores find them.
"""

from typing import TYPE_CHECKING

from circuitvit._lazy import lazy

if TYPE_CHECKING:
    from circuitvit.groundtruth import Separation as Separation
    from circuitvit.groundtruth import active_edges as active_edges
    from circuitvit.groundtruth import separation as separation
    from circuitvit.testing.assertions import assert_faithful as assert_faithful
    from circuitvit.testing.assertions import assert_hypothesis as assert_hypothesis
    from circuitvit.testing.assertions import assert_minimal as assert_minimal
    from circuitvit.testing.assertions import assert_necessary as assert_necessary
    from circuitvit.testing.assertions import assert_no_drift as assert_no_drift
    from circuitvit.testing.assertions import assert_unchanged as assert_unchanged
    from circuitvit.testing.log import Entry as Entry
    from circuitvit.testing.log import entries as entries
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "circuitvit.groundtruth": "Separation active_edges separation",
            "circuitvit.testing.assertions": (
                "assert_faithful assert_hypothesis assert_minimal assert_necessary assert_no_drift "
                "assert_unchanged"
            ),
            "circuitvit.testing.log": "Entry entries",
        },
    )
