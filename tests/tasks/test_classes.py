"""Classes by index, by any of their names, and by WordNet id; doubtful names are refused, never guessed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuitvit.errors import NameNotFoundError, OptionError
from circuitvit.models import Model, wrap
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks.classes import class_index, class_label

ANIMALS = ("tabby, tabby cat", "Border collie", "crane", "7", "crane", "", "tiger, Panthera tigris")


def tiny_model(n_classes: int, classes: tuple[str, ...] | None = None) -> Model:
    vit = import_timm().models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=n_classes
    )
    return wrap(vit.eval(), name="tiny", classes=classes)


@pytest.fixture(scope="module")
def animals() -> Model:
    return tiny_model(len(ANIMALS), ANIMALS)


@pytest.fixture(scope="module")
def nameless() -> Model:
    return tiny_model(4)


@pytest.fixture(scope="module")
def imagenet() -> Model:
    """A model whose thousand logits have ImageNet's names; its weights do not matter here."""
    return tiny_model(1000)


class TestIndices:
    @pytest.mark.parametrize("wanted", [1, "1", " 1 ", np.int64(1), torch.tensor(1)])
    def test_whole_numbers_of_any_kind(self, animals: Model, wanted: int | str) -> None:
        index = class_index(animals, wanted)
        assert (index, type(index)) == (1, int)

    def test_models_without_names_take_them_too(self, nameless: Model) -> None:
        assert class_index(nameless, 3) == class_index(nameless, "3") == 3

    @pytest.mark.parametrize("wanted", [-1, 4, "4", "-1"])
    def test_out_of_range(self, nameless: Model, wanted: int | str) -> None:
        with pytest.raises(OptionError, match=f"no class {wanted}: tiny has 4, from 0 to 3"):
            class_index(nameless, wanted)

    @pytest.mark.parametrize("wanted", [1.0, True, None, np.float32(2)])
    def test_other_things_are_no_class(self, nameless: Model, wanted: object) -> None:
        with pytest.raises(OptionError, match="a class is an index or a name, not"):
            class_index(nameless, wanted)  # type: ignore[arg-type]

    def test_a_class_called_by_a_number_is_found_by_its_name(self, animals: Model) -> None:
        assert class_index(animals, "7") == 3
        assert class_index(animals, "6") == 6


class TestNames:
    @pytest.mark.parametrize("wanted", ["tabby, tabby cat", "tabby", "Tabby Cat", " TABBY ", "tabby_cat"])
    def test_whole_or_synonym_in_any_case(self, animals: Model, wanted: str) -> None:
        assert class_index(animals, wanted) == 0

    def test_a_shared_name_is_refused_with_the_candidates(self, animals: Model) -> None:
        with pytest.raises(
            OptionError, match=r"several classes are called 'Crane': 2 \(crane\); 4 \(crane\)"
        ):
            class_index(animals, "Crane")

    @pytest.mark.parametrize(("wanted", "hint"), [("tabbi", "tabby"), ("border colie", "Border collie")])
    def test_a_near_miss_suggests_the_right_name(self, animals: Model, wanted: str, hint: str) -> None:
        with pytest.raises(NameNotFoundError, match=f"unknown class '{wanted}': did you mean '{hint}'"):
            class_index(animals, wanted)

    @pytest.mark.parametrize("wanted", ["", "  ", ","])
    def test_nothing_is_no_name_not_even_of_a_nameless_class(self, animals: Model, wanted: str) -> None:
        with pytest.raises(NameNotFoundError, match="unknown class"):
            class_index(animals, wanted)

    def test_a_model_without_names_says_what_to_do(self, nameless: Model) -> None:
        with pytest.raises(OptionError, match=r"tiny has no class names.*index from 0 to 3.*classes="):
            class_index(nameless, "tabby")


class TestImageNet:
    @pytest.mark.parametrize(
        ("wanted", "index"),
        [("tabby", 281), ("281", 281), ("n02123045", 281), ("N02123045", 281), ("border collie", 232)],
    )
    def test_names_and_synsets(self, imagenet: Model, wanted: str, index: int) -> None:
        assert class_index(imagenet, wanted) == index

    @pytest.mark.parametrize(("wanted", "first", "second"), [("crane", 134, 517), ("maillot", 638, 639)])
    def test_shared_names_are_listed_with_index_and_synset(
        self, imagenet: Model, wanted: str, first: int, second: int
    ) -> None:
        with pytest.raises(OptionError, match=rf"{first} \(.*n0\d+\); {second} \(.*n0\d+\); give the index"):
            class_index(imagenet, wanted)

    def test_every_class_is_found_by_its_synset(self, imagenet: Model) -> None:
        assert imagenet.synsets is not None
        assert [class_index(imagenet, synset) for synset in imagenet.synsets] == list(range(1000))

    def test_labels_are_short_and_tell_classes_apart(self, imagenet: Model) -> None:
        labels = [class_label(imagenet, index) for index in range(1000)]
        assert labels[281] == "tabby"
        assert labels[134] == "crane (class 134)"
        assert len(set(labels)) == 1000


class TestLabels:
    def test_the_first_synonym(self, animals: Model) -> None:
        assert class_label(animals, 0) == "tabby"
        assert class_label(animals, 6) == "tiger"

    @pytest.mark.parametrize("index", [5, 99, -1])
    def test_without_a_name_the_index(self, animals: Model, index: int) -> None:
        assert class_label(animals, index) == f"class {index}"

    def test_a_model_without_names(self, nameless: Model) -> None:
        assert class_label(nameless, 2) == "class 2"
