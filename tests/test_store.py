"""The feature store: what it returns is what the network says, whatever has happened to the folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cldf_fast.config import Config, make_config
from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import ConfigError
from cldf_fast.features import DiffusionFeatures
from cldf_fast.models.decoder import PixelDecoder
from cldf_fast.models.unet import UNet
from cldf_fast.pipeline import CLDF, build_features
from cldf_fast.run import DatasetRecord, Run
from cldf_fast.store import FeatureStore

Randomise = Callable[[nn.Module], nn.Module]

ROOT = Path(__file__).resolve().parents[1]
NETWORK: dict[str, Any] = {
    "channel_mult": (1, 2), "attention_downsample": (2,), "num_heads": 2, "num_classes": 4, "patch_size": 2
}  # fmt: skip
CHOICES: dict[str, Any] = {"noise_levels": (0.02, 0.3), "downsample": (4, 2)}


@pytest.fixture
def unet(randomised: Randomise) -> UNet:
    unet = UNet(2, 8, **NETWORK)
    randomised(unet)
    return unet.eval().requires_grad_(False)


def features_of(network: nn.Module, **changes: Any) -> DiffusionFeatures:
    return DiffusionFeatures(network, Diffusion(), **(CHOICES | changes))


def images(count: int) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 2, 12, 16) * 2 - 1, torch.arange(count) % 4


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def assert_near(got: list[Tensor], exact: list[Tensor], dtype: str = "float16") -> None:
    """Within the rounding of the store's dtype, with room for what the batch does to a sum in the network."""
    assert len(got) == len(exact)
    for block, reference in zip(got, exact, strict=True):
        largest = reference.abs().amax(dim=(2, 3), keepdim=True)
        step = reference.abs() * 2**-11 if dtype == "float16" else largest / 254
        assert block.dtype == torch.float32
        assert ((block - reference).abs() <= step * 1.001 + largest * 2e-6 + 1e-5).all()


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert [block.shape for block in got] == [block.shape for block in expected]
    assert all(block.equal(reference) for block, reference in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_features_are_the_network_s_rounded_and_the_second_reading_is_the_first(
    unet: UNet, tmp_path: Path, dtype: Any
) -> None:
    x, condition = images(5)
    features = features_of(unet)
    stored = FeatureStore(features, tmp_path, dtype=dtype)
    exact, first = features(x, condition), stored(x, condition)
    assert stored.channels == features.channels
    assert_near(first, exact, dtype)
    assert any(not block.equal(reference) for block, reference in zip(first, exact, strict=True))
    assert (stored.found, stored.computed, len(files_in(tmp_path))) == (0, 5, 5)
    unet.register_forward_pre_hook(lambda *_: pytest.fail("computed again"))
    unet.middle_block.register_forward_pre_hook(lambda *_: pytest.fail("computed again"))
    assert_same(stored(x, condition), first)
    anew = FeatureStore(features, tmp_path, dtype=dtype)
    assert_same(anew(x, condition), first)
    assert (anew.found, anew.computed) == (5, 0)


def test_only_images_that_are_new_are_computed_and_once(unet: UNet, tmp_path: Path) -> None:
    x, condition = images(7)
    stored = FeatureStore(features_of(unet), tmp_path)
    rows: list[int] = []
    unet.middle_block.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    some = stored(x[2:5], condition[2:5])
    order = torch.tensor([6, 3, 0, 3, 2, 6, 5, 1, 4])
    mixed = stored(x[order], condition[order])
    assert rows == [2 * 3, 2 * 4]
    assert (stored.found, stored.computed) == (5, 7)
    together = stored(x, condition)
    assert_same(mixed, [block[order] for block in together])
    assert_same(some, [block[2:5] for block in together])
    assert_same(stored(x.flip(0), condition.flip(0)), [block.flip(0) for block in together])
    assert sum(rows) == 2 * 7
    assert_near(together, features_of(unet)(x, condition))


def test_a_batch_of_none_has_maps_of_none(unet: UNet, tmp_path: Path) -> None:
    stored = FeatureStore(features_of(unet), tmp_path)
    for x, condition in (images(0), tuple(part[:0] for part in images(3))):
        got = stored(x, condition)
        one = features_of(unet)(torch.zeros(1, 2, 12, 16), torch.tensor([0]))
        assert [block.shape for block in got] == [(0, *block.shape[1:]) for block in one]
    assert files_in(tmp_path) == []


def one_pixel(x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    changed = x.clone()
    changed[:, 1, 3, 2] = changed[:, 1, 3, 2].nextafter(torch.tensor(2.0))
    return changed, condition


@pytest.mark.parametrize(
    "change",
    [one_pixel, lambda x, condition: (x, (condition + 1) % 4), lambda x, condition: (x.flip(1), condition)],
    ids=["pixel", "condition", "channels"],
)
def test_another_image_or_condition_is_another_entry(
    unet: UNet, tmp_path: Path, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    stored = FeatureStore(features_of(unet), tmp_path)
    x, condition = images(3)
    stored(x, condition)
    other = change(x, condition)
    assert_near(stored(*other), features_of(unet)(*other))
    assert (stored.found, stored.computed) == (0, 6)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_levels": (0.02, 0.301)},
        {"noise_levels": (0.3, 0.02)},
        {"downsample": (2,)},
        {"downsample": None, "blocks": ["output_blocks.0", "output_blocks.1", "output_blocks.3", "output_blocks.2"]},
        {"prediction": False},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_another_reading_is_another_entry(unet: UNet, tmp_path: Path, changes: dict[str, Any]) -> None:
    x, condition = images(3)
    FeatureStore(features_of(unet), tmp_path)(x, condition)
    features = features_of(unet, **changes)
    stored = FeatureStore(features, tmp_path)
    assert_near(stored(x, condition), features(x, condition))
    assert stored.found == 0


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"key": "another call"}], ids=str)
def test_another_store_s_entries_are_not_read(unet: UNet, tmp_path: Path, options: dict[str, Any]) -> None:
    x, condition = images(3)
    FeatureStore(features_of(unet), tmp_path)(x, condition)
    stored = FeatureStore(features_of(unet), tmp_path, **options)
    stored(x, condition)
    assert (stored.found, len(files_in(tmp_path))) == (0, 6)


def one_weight(unet: UNet) -> None:
    with torch.no_grad():
        unet.middle_block[0].out_layers[-1].weight[1, 2, 0, 0] += 0.5  # type: ignore[index]


def all_weights(unet: UNet) -> None:
    unet.load_state_dict({key: 1.1 * value for key, value in unet.state_dict().items()})


def replaced(unet: UNet) -> None:
    unet.load_state_dict({key: 1.1 * value for key, value in unet.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [one_weight, all_weights, replaced])
@pytest.mark.parametrize("reopened", [True, False])
def test_weights_that_change_are_seen_and_those_before_are_found_again(
    unet: UNet, tmp_path: Path, change: Callable[[UNet], None], reopened: bool
) -> None:
    x, condition = images(2)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    stored = FeatureStore(features_of(unet), tmp_path)
    first = stored(x, condition)
    change(unet)
    if reopened:
        stored = FeatureStore(features_of(unet), tmp_path)
    changed = stored(x, condition)
    assert_near(changed, features_of(unet)(x, condition))
    assert stored.found == 0
    assert not any(block.equal(other) for block, other in zip(first, changed, strict=True))
    unet.load_state_dict(before)
    assert_same(stored(x, condition), first)
    assert stored.found == 2


def test_networks_of_the_same_weights_but_other_structure_are_told_apart(
    unet: UNet, randomised: Randomise, tmp_path: Path
) -> None:
    x, condition = images(3)
    other = UNet(2, 8, **NETWORK | {"num_heads": 4})
    other.load_state_dict(unet.state_dict())
    first = FeatureStore(features_of(unet), tmp_path)(x, condition)
    stored = FeatureStore(features_of(other.eval()), tmp_path)
    assert not stored(x, condition)[0].allclose(first[0], atol=1e-3)
    assert stored.found == 0


# --- Damage -----------------------------------------------------------------------------------------------------------


def check_recovery(stored: FeatureStore, *arguments: Tensor) -> None:
    computed = stored.computed
    with pytest.warns(UserWarning, match=r"safetensors: can't be read \(.+\); the features are computed again") as seen:
        got = stored(*arguments)
    assert len(seen) == 1
    assert stored.computed == computed + 1
    assert_near(got, stored.features(*arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(stored(*arguments), got)
    assert stored.computed == computed + 1


def test_a_truncated_file_is_computed_again(unet: UNet, tmp_path: Path) -> None:
    arguments, stored = images(2), FeatureStore(features_of(unet), tmp_path)
    stored(*arguments)
    path = files_in(tmp_path)[0]
    whole = path.stat().st_size
    for length in (0, 1, 8, 9, 100, int(torch.randint(101, whole - 1, ())), whole - 1):
        # A new file, as a power cut leaves it: the old one may still be mapped.
        content = path.read_bytes()[:length]
        path.unlink()
        path.write_bytes(content)
        check_recovery(stored, *arguments)


def test_a_flipped_bit_anywhere_is_computed_again(unet: UNet, tmp_path: Path) -> None:
    arguments, stored = images(2), FeatureStore(features_of(unet), tmp_path)
    stored(*arguments)
    path = files_in(tmp_path)[1]
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    text = path.read_bytes()[8:header].rstrip()
    # Blanks at the header's end are padding, which means nothing.
    places = [
        *torch.randint(8 + len(text), (12,)).tolist(),
        *torch.randint(header, path.stat().st_size, (12,)).tolist(),
    ]
    for place in places:
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << int(torch.randint(8, ()))
        path.unlink()
        path.write_bytes(content)
        check_recovery(stored, *arguments)


def test_an_entry_in_another_s_place_is_computed_again(unet: UNet, tmp_path: Path) -> None:
    arguments, stored = images(2), FeatureStore(features_of(unet), tmp_path)
    stored(*arguments)
    one, two = files_in(tmp_path)
    two.write_bytes(one.read_bytes())
    check_recovery(stored, *arguments)


def test_what_a_killed_process_leaves_is_not_read(unet: UNet, tmp_path: Path) -> None:
    arguments, stored = images(1), FeatureStore(features_of(unet), tmp_path)
    exact = stored.features(*arguments)
    stored(*arguments)
    (path,) = files_in(tmp_path)
    path.rename(path.with_name(f".partial-0123abcd-{path.name}"))
    assert_near(stored(*arguments), exact)
    assert stored.computed == 2


# --- Several processes, a bounded disk --------------------------------------------------------------------------------

_READS = """
import sys, torch
from cldf_fast.diffusion import Diffusion
from cldf_fast.features import DiffusionFeatures
from cldf_fast.store import FeatureStore
folder, job = sys.argv[1], torch.load(sys.argv[2], weights_only=False)
store = FeatureStore(DiffusionFeatures(job["unet"], Diffusion(), **job["choices"]), folder)
for row in range(len(job["x"])):
    store(job["x"][row : row + 1], job["condition"][row : row + 1])
"""


def test_two_processes_fill_a_folder_together(unet: UNet, tmp_path: Path) -> None:
    x, condition = images(60)
    torch.save({"unet": unet, "choices": CHOICES, "x": x, "condition": condition}, tmp_path / "job.pt")
    folder = tmp_path / "features"
    arguments = [sys.executable, "-W", "error", "-c", _READS, str(folder), str(tmp_path / "job.pt")]
    stored = FeatureStore(features_of(unet), folder)
    with subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}) as other:
        while not files_in(folder) and other.poll() is None:
            time.sleep(0.001)
        for row in range(60):
            stored(x[row : row + 1], condition[row : row + 1])
        assert other.wait() == 0
    stored = FeatureStore(features_of(unet), folder)
    assert_near(stored(x, condition), features_of(unet)(x, condition))
    assert (stored.found, stored.computed) == (60, 0)
    assert list(folder.rglob(".*")) == []


@pytest.mark.filterwarnings("ignore:.*no more features are stored")
def test_writers_that_do_not_know_of_each_other_keep_the_bound(unet: UNet, tmp_path: Path) -> None:
    x, condition = images(40)
    FeatureStore(features_of(unet), tmp_path / "one")(x[:1], condition[:1])
    size = files_in(tmp_path / "one")[0].stat().st_size
    folder, bound = tmp_path / "all", 21 * size
    writers = [FeatureStore(features_of(unet), folder, max_bytes=bound) for _ in range(3)]
    for row in range(40):
        writers[row % 3](x[row : row + 1], condition[row : row + 1])
    # A hundredth of the bound is less than an entry here: each looks again before it writes another.
    assert 20 * size <= sum(path.stat().st_size for path in files_in(folder)) <= bound


def test_the_bound_holds_is_said_once_and_changes_no_features(unet: UNet, tmp_path: Path) -> None:
    x, condition = images(9)
    exact = features_of(unet)(x, condition)
    FeatureStore(features_of(unet), tmp_path / "all")(x, condition)
    size = files_in(tmp_path / "all")[0].stat().st_size
    bounded = FeatureStore(features_of(unet), tmp_path / "some", max_bytes=4 * size + size // 2)
    with pytest.warns(
        UserWarning, match=r"some: no more features are stored \(its bound of \d+ bytes is reached\)"
    ) as seen:
        for _ in range(2):
            for rows in torch.arange(9).split(2):
                assert_near(bounded(x[rows], condition[rows]), [block[rows] for block in exact])
    assert len(seen) == 1
    assert len(files_in(tmp_path / "some")) == 4
    assert (bounded.found, bounded.computed) == (4, 14)
    again = FeatureStore(features_of(unet), tmp_path / "some", max_bytes=5 * size + size // 2)
    with pytest.warns(UserWarning, match="no more features are stored"):
        again(x, condition)
    assert len(files_in(tmp_path / "some")) == 5


def test_a_folder_that_cannot_be_written_is_said_once(unet: UNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    arguments, stored = images(3), FeatureStore(features_of(unet), tmp_path / "file")
    with pytest.warns(UserWarning, match="file: no more features are stored") as seen:
        for _ in range(2):
            assert_near(stored(*arguments), features_of(unet)(*arguments))
    assert len(seen) == 1


def test_what_cannot_be_is_named(unet: UNet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: expected 'float16' or 'int8', got 'float32'"):
        FeatureStore(features_of(unet), tmp_path, dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_bytes: expected at least 0, got -1"):
        FeatureStore(features_of(unet), tmp_path, max_bytes=-1)


# --- Values and networks of every kind --------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Channels of very different magnitudes; takes no condition."""

    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        self.register_buffer("factors", torch.tensor(factors).view(1, -1, 1, 1), persistent=False)
        self.inner = nn.Identity()

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.inner(x * self.factors)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_magnitudes_beyond_half_precision_and_zeros_are_kept(tmp_path: Path, dtype: Any) -> None:
    x = torch.rand(3, 1, 5, 7) * 2 - 1
    example, factors = (x, None), [1e9, 1e-9, 1.0, 0.0]
    features = features_of(Scaled(factors), downsample=None, blocks=["inner"], prediction=False, example=example)
    stored = FeatureStore(features, tmp_path, dtype=dtype)
    for _ in range(2):
        for got, exact in zip(stored(x, None)[0].unbind(1), features(x, None)[0].unbind(1), strict=True):
            torch.testing.assert_close(got, exact, rtol=0, atol=float(exact.abs().max()) / 250)
    assert (stored.found, stored.computed) == (3, 3)
    others = features_of(Scaled(factors[::-1]), downsample=None, blocks=["inner"], prediction=False, example=example)
    other = FeatureStore(others, tmp_path, dtype=dtype)(x, None)[0]
    torch.testing.assert_close(other, stored(x, None)[0].unflatten(1, (2, 4)).flip(2).flatten(1, 2), rtol=0, atol=1e8)
    assert (other[:, 0] == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_channel_with_a_value_that_is_not_finite_stays_recognisable(tmp_path: Path, dtype: Any, value: float) -> None:
    network = Scaled([1.0, 2.0])
    x = torch.rand(2, 1, 4, 4) * 2 - 1
    features = features_of(network, downsample=None, blocks=["inner"], prediction=False, example=(x, None))
    network.inner.register_forward_hook(
        lambda _m, _a, out: out.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(value))
    )
    stored = FeatureStore(features, tmp_path, dtype=dtype)
    for _ in range(2):
        (got,) = stored(x, None)
        assert got[0].isfinite().flatten(1).all(dim=1).tolist() == [True, False, True, True]
        assert not got[0, 1].isfinite().any()
        assert got[1].isfinite().all()


# --- In the pipeline --------------------------------------------------------------------------------------------------


def configured(config: Config, **values: Any) -> Config:
    content = config.model_dump()
    return make_config(content | {"features": content["features"] | values})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_precision_and_store_are_configured(tiny_config: Config, tiny_cldf: CLDF, tmp_path: Path, dtype: str) -> None:
    plain = build_features(configured(tiny_config, dtype=dtype), tiny_cldf.unet, tmp_path)
    assert isinstance(plain, DiffusionFeatures)
    assert plain.dtype == getattr(torch, dtype)
    config = configured(tiny_config, dtype=dtype, store="int8", store_gib=0.5)
    stored = build_features(config, tiny_cldf.unet, tmp_path)
    assert isinstance(stored, FeatureStore)
    assert (stored.dtype, stored.max_bytes, stored.folder) == (torch.int8, 2**29, tmp_path)
    assert stored.features.dtype == getattr(torch, dtype)
    assert isinstance(build_features(config, tiny_cldf.unet), DiffusionFeatures)


def test_a_run_keeps_features_only_where_it_is_asked_to(tiny_cldf: CLDF, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.create(configured(tiny_cldf.config, store="float16"), DatasetRecord(("a", "b", "c"), ("t1", "t2")))
    run.save_network("cdm", tiny_cldf.unet)
    run.save_network("classifier", tiny_cldf.classifier)
    assert tiny_cldf.decoder is not None
    assert tiny_cldf.prototypes is not None
    run.save_decoder(tiny_cldf.decoder, tiny_cldf.prototypes, tiny_cldf.label_threshold)
    x = torch.rand(3, 2, 16, 16) * 2 - 1
    expected = run.load().segment(x)
    assert not run.feature_folder.exists()
    for _ in range(2):
        got = run.load(store=True).segment(x)
        torch.testing.assert_close(got.probability, expected.probability, rtol=0, atol=0.02)
        assert len(files_in(run.feature_folder)) == 6  # of two views
    run.drop_features()
    assert not run.feature_folder.exists()
    run.drop_features()


def test_a_decoder_embeds_through_a_store_and_without_one_as_from_maps(unet: UNet, tmp_path: Path) -> None:
    features = features_of(unet)
    x, labels = images(3)
    decoder = PixelDecoder(features.channels, hidden=12, embedding=6).eval()
    expected = decoder.dense(features(x, labels), (12, 16))
    got = decoder.embed(features, x, labels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not got.requires_grad
    torch.testing.assert_close(decoder.embed(FeatureStore(features, tmp_path), x, labels), expected, rtol=0, atol=2e-3)
