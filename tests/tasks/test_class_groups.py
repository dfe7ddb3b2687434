"""Groups of classes: WordNet's of ImageNet, of other models' classes by their names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import torch
from PIL import Image

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import CircuitViTError, DataError, NameNotFoundError, OptionError
from circuitvit.models import Model
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks import as_task, select_pairs
from circuitvit.tasks.classes import class_index, class_indices, spec_label
from circuitvit.tasks.kinds import meanings, taken_for
from circuitvit.tasks.wordnet import FORMAT, SCHEMA, VERSION, tree
from circuitvit.tasks.written import as_python
from circuitvit.verification import check_hypotheses

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DOGS, HOUSE_CATS = range(151, 269), range(281, 286)
"""Where ImageNet-1k has its breeds of dogs, and its cats that are no wild ones."""


def tiny(n_classes: int, classes: tuple[str, ...] | None = None) -> Model:
    vit = import_timm().models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=n_classes
    )
    return cv.wrap(vit.eval(), name="tiny", classes=classes)


@pytest.fixture(scope="module")
def imagenet() -> Model:
    return tiny(1000)


@pytest.fixture(scope="module")
def cifar() -> Model:
    return tiny(10, CIFAR)


class TestImageNet:
    @pytest.mark.parametrize(
        ("word", "members"),
        [
            ("dog", DOGS),
            ("Dogs", DOGS),
            ("n02084071", DOGS),
            ("domestic_cat", HOUSE_CATS),
            ("cat", [*HOUSE_CATS, 286, 287]),  # WordNet has cougar and lynx below "cat, true cat"
            ("big cat", range(288, 294)),  # leopard to cheetah: also called "cat", but not first
            ("bird", [*range(7, 25), *range(80, 101), *range(127, 147)]),
            ("geese", [99]),
            ("beer glass", [441]),
        ],
    )
    def test_groups_are_whole(self, imagenet: Model, word: str, members: list[int]) -> None:
        assert list(cv.group(word).members(imagenet)) == list(members)

    def test_a_text_says_the_same_wherever_a_class_is_named(self, imagenet: Model) -> None:
        assert class_indices(imagenet, "group:cat") == class_indices(imagenet, cv.group("cat"))
        assert class_indices(imagenet, [" Group:domestic cats", "tench"]) == (*HOUSE_CATS, 0)

    def test_a_name_that_is_a_group_offers_it(self, imagenet: Model) -> None:
        offered = r"'dog' is no single class of tiny; it is a group of 118 \(Chihuahua, .*\('dog'\) for all"
        with pytest.raises(NameNotFoundError, match=offered):
            class_index(imagenet, "dog")
        with pytest.raises(NameNotFoundError, match="unknown class 'tabbies': did you mean 'tabby'"):
            class_index(imagenet, "tabbies")

    def test_a_word_of_two_meanings_is_refused_and_an_identifier_settles_it(self, imagenet: Model) -> None:
        with pytest.raises(OptionError, match=r"wading bird \(n02012849\): .* lifting device \(n03126707\)"):
            cv.group("crane").members(imagenet)
        assert [*cv.group("n02012849").members(imagenet)] == [134]
        assert [*cv.group("n03126707").members(imagenet)] == [517]

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("vehcle", "unknown group 'vehcle': did you mean 'vehicle'"),
            ("unicorns", "unknown group"),
            ("n00000000", "unknown group"),
            ("book", "none of the classes of tiny is a kind of 'book'"),
        ],
    )
    def test_no_members(self, imagenet: Model, word: str, message: str) -> None:
        with pytest.raises(NameNotFoundError, match=message):
            cv.group(word).members(imagenet)

    def test_names_without_identifiers_are_known_for_imagenets_by_their_order(self, imagenet: Model) -> None:
        assert imagenet.classes is not None
        firsts = tuple(names.split(",")[0] for names in imagenet.classes)
        assert meanings(tiny(1000, firsts)) == meanings(imagenet)
        turned = tiny(1000, firsts[::-1])
        assert [*cv.group("bear").members(turned)] == [999 - bear for bear in (297, 296, 295, 294)]
        with pytest.raises(
            OptionError, match="not clear whether the class 'cardigan'"
        ):  # a corgi, or knitwear
            cv.group("dog").members(turned)

    def test_of_imagenet_21k(self) -> None:
        """ImageNet-1k's dogs are among its own."""
        large = tiny(21843)
        synsets = large.synsets
        assert synsets is not None
        members = {synsets[index] for index in class_indices(large, "group:dog")}
        assert {tree().imagenet[dog] for dog in DOGS} < members
        assert len(members) < 200


class TestOtherModels:
    def test_kinds_of_names(self, cifar: Model) -> None:
        animals, vehicles = cv.group("animal").members(cifar), cv.group("vehicle").members(cifar)
        assert [*animals.values()] == ["bird", "cat", "deer", "dog", "frog", "horse"]
        assert [*vehicles.values()] == ["airplane", "automobile", "ship", "truck"]
        assert "horse: horse, Equus caballus" in taken_for(cifar, [7])[0]

    def test_plurals_identifiers_and_names_that_wordnet_lacks(self) -> None:
        own = tiny(5, ("cats", "n02099601", "Dogs", "zzyx_17", "tabby, tabby cat"))
        assert [*cv.group("cat").members(own)] == [0, 4]
        assert [*cv.group("dog").members(own)] == [1, 2]
        assert [*cv.group("zzyx 17").members(own)] == [3]

    def test_a_name_of_two_meanings_joins_neither(self) -> None:
        doubtful = tiny(2, ("crane", "truck"))
        for word in ("bird", "machine", "device", "artifact"):
            with pytest.raises(
                CircuitViTError, match=r"not clear whether the class 'crane'|none of the classes"
            ):
                cv.group(word).members(doubtful)
        assert [*cv.group("crane").members(doubtful)] == [0]

    def test_no_names(self) -> None:
        with pytest.raises(OptionError, match="tiny has no class names, so group:cat cannot be found"):
            cv.group("cat").members(tiny(3))

    def test_a_class_that_is_called_like_a_group_goes_first(self) -> None:
        assert class_indices(tiny(2, ("group:b", "b")), "group:b") == (0,)


class TestUse:
    def test_the_logit_of_a_group_is_that_of_its_classes(self, imagenet: Model) -> None:
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        task = cv.Task(images, images.flip(0), cv.logit_diff(cv.group("domestic cat"), "group:dog"))
        prepared = task.prepare(imagenet)
        assert prepared.metric.label == "logit_diff(domestic cat (5 classes), dog (118 classes))"
        logits = imagenet(images)
        odds = logits[:, [*HOUSE_CATS]].logsumexp(1) - logits[:, [*DOGS]].logsumexp(1)
        torch.testing.assert_close(prepared.metric(logits, logits, torch.arange(2)), odds)
        again = cv.tasks.as_task(prepared).with_options(ablation="mean").prepare(imagenet)
        assert again.metric.label == prepared.metric.label

    def test_a_report_says_what_names_were_taken_for(self) -> None:
        model, pairs = cv.load("catdog-tiny"), catdog_pairs(2, seed=0)
        task = cv.Task(pairs.clean, pairs.corrupt, cv.logit_diff("group:feline", "group:canine")).prepare(
            model
        )
        whole = cv.attribute(model, task, "eap", progress=False).top(20)
        report = cv.verify(model, task, whole, n_random=0, progress=False)
        (said,) = [each for each in report.warnings if "were found by the names" in each]
        assert "cat: cat, true cat, a kind of feline (n02121620); dog: dog" in said

    def test_predictions_flip_to_groups(self) -> None:
        model, pairs = cv.load("catdog-tiny"), catdog_pairs(3, seed=0)
        task = cv.Task(pairs.clean, pairs.corrupt, cv.logit_diff("cat", "dog"))
        edges = cv.attribute(model, task, "eap", progress=False).top(100)
        by_name, by_group = (
            cv.Hypothesis("all flip", edges, cv.Flips(to, start), scope="these pairs")
            for to, start in (("dog", "cat"), (cv.group("canine"), "group:feline"))
        )
        found = check_hypotheses(model, task, [by_name, by_group], progress=False)
        assert found[0].reason == found[1].reason
        assert "3 of 3 pairs flip" in found[0].reason

    def test_groups_that_overlap_are_refused(self, imagenet: Model) -> None:
        task = cv.Task(
            torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16), cv.logit_diff("group:animal", "group:dog")
        )
        with pytest.raises(DataError, match=r"target and foil share classes \(Chihuahua and 117 more\)"):
            task.prepare(imagenet)

    def test_groups_of_ones_own(self, imagenet: Model) -> None:
        pets = cv.group("my pets", ["tabby", "Border collie", 0])
        assert [*pets.members(imagenet)] == [281, 232, 0]
        assert spec_label(imagenet, pets) == "my pets (3 classes)"

    def test_where_one_class_is_meant_members_are_named(self, imagenet: Model) -> None:
        with pytest.raises(
            OptionError, match=r"group:domestic cat is 5 \(tabby, tiger cat, Persian cat, ...\)"
        ):
            class_index(imagenet, cv.group("domestic cat"))
        assert class_index(imagenet, "group:goose") == 99

    def test_a_task_is_written_down_with_its_groups(self) -> None:
        own = cv.logit_diff(cv.group("cat"), ["dog", cv.group("wild", ["bear", "rabbit"])])
        said = as_python(cv.Task("cats/", "dogs/", own))
        assert said == (
            "cv.Task('cats/', 'dogs/', cv.logit_diff(cv.group('cat'), "
            "['dog', cv.group('wild', ['bear', 'rabbit'])]))"
        )
        assert as_python(eval(said, {"cv": cv})) == said

    def test_groups_of_a_table_keep_their_names(self, tmp_path: Path) -> None:
        """Also where some pairs are taken, and as a task again."""
        for name in ("a.png", "b.png"):
            Image.new("RGB", (48, 48), (name[0] == "a" and "red") or "blue").save(tmp_path / name)
        lines = ["a.png,b.png,group:animal,thing", "b.png,a.png,group:animal,thing"]
        (tmp_path / "pairs.csv").write_text("\n".join(["clean,corrupt,target,foil", *lines]))
        model = cv.load("catdog-tiny", classes=["cat", "dog", "thing", "bear"])
        prepared = cv.Task.from_csv(tmp_path / "pairs.csv", "logit_diff").prepare(model)
        assert prepared.metric.label == "logit_diff(animal (3 classes), thing)"
        again = as_task(select_pairs(prepared, [1])).prepare(model)
        assert again.metric.label == prepared.metric.label
        assert again.pairing == prepared.pairing == "2 pairs listed in pairs.csv"
        assert not as_task(prepared).with_options(clean=[Image.new("RGB", (48, 48))] * 2).pairing

    @pytest.mark.parametrize(
        ("name", "classes"), [("", None), ("  ", None), (7, None), ("a", []), ("a", "b")]
    )
    def test_what_is_no_group(self, name: object, classes: object) -> None:
        with pytest.raises(OptionError, match=r"a group has a name|members of a group"):
            cv.group(name, classes)  # type: ignore[arg-type]


class TestTree:
    def test_keeps_to_its_schema(self) -> None:
        """A fiftieth of the synsets: all of them take seconds, and are checked when the file is written."""
        known = tree()
        synsets = {
            name: [", ".join(known.names[name]), *known.parents[name]] for name in sorted(known.names)[::50]
        }
        content = {"format": FORMAT, "version": VERSION, "source": "", "synsets": synsets}
        content |= {name: getattr(known, name) for name in ("commonest", "plurals")}
        jsonschema.validate({**content, "imagenet": list(known.imagenet)}, SCHEMA)

    def test_has_one_root_and_all_of_imagenet(self) -> None:
        known = tree()
        assert [name for name, parents in known.parents.items() if not parents] == ["n00001740"]
        assert {parent for parents in known.parents.values() for parent in parents} <= set(known.names)
        for subset in ("imagenet-1k", "imagenet-12k", "imagenet-21k-goog"):
            assert set(import_timm().data.ImageNetInfo(subset).label_names()) <= set(known.names)

    def test_wordnets_notice_lies_beside_it(self) -> None:
        notice = Path(cv.tasks.wordnet.__file__).with_name("LICENSE").read_text()
        assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice


def test_a_real_vit_tells_cats_from_dogs_by_groups(shared_data: Path) -> None:
    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    folder = shared_data / "images" / "cats_vs_dogs"
    photos = [folder / "cats" / "cat.4005.jpg", folder / "dogs" / "dog.4001.jpg"]
    sides = cv.group("domestic cat"), cv.group("dog")
    view = cv.direct_logit_attribution(model, photos, *sides)
    assert view.label == "domestic cat (5 classes) - dog (118 classes)"
    assert view.total[0] > 2 > -2 > view.total[1]
    assert abs(view.total - view.logit_difference).max() < 1e-3
