"""Published and foreign checkpoints in, safetensors that describe themselves out.

`load` reads UNets and classifiers of guided-diffusion, improved-diffusion and what grew out of them, and files that
`save` wrote. `from_diffusers` and `from_monai` take networks of those libraries, `to_diffusers` and `to_monai` give
them. What tensors can't tell, such as the number of attention heads or the range of pixels, must be stated: a wrong
guess would give wrong results without an error.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from cldf_fast.diffusion import Diffusion
from cldf_fast.errors import CheckpointError, ConfigError
from cldf_fast.files import atomic_write_bytes
from cldf_fast.models import peers
from cldf_fast.models.architecture import Architecture, Kind, Network, first_difference, infer
from cldf_fast.ops._arguments import check_count

if TYPE_CHECKING:
    from typing_extensions import Unpack

_METADATA = "cldf_fast"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "ema")
_PREFIXES = ("module.", "_orig_mod.")


class Stated(TypedDict, total=False):
    """What tensors can't tell. Each is asked for where it is needed.

    num_heads or num_head_channels: attention heads, or channels of a head (classifiers: channels).
    new_attention_order: heads are split after q, k, v (guided-diffusion's use_new_attention_order).
    timesteps, schedule, rescale_timesteps: of the training process, see `Diffusion`.
    pixel_range: lowest and highest pixel of the images trained on: (-1, 1), or (0, 1).
    channel_names: meaning of the input channels, in order.
    labels: meaning of rows of the class table, or of the classifier's logits; as many as are known.
    multi_label: whether a classifier's logits are independent (sigmoid), or compete (softmax).
    num_res_blocks: where a classifier's tensors allow several. weights: which of several networks in a file ("ema").
    """

    num_heads: int
    num_head_channels: int
    new_attention_order: bool
    timesteps: int
    schedule: str
    rescale_timesteps: bool
    pixel_range: tuple[float, float]
    channel_names: tuple[str, ...]
    labels: Mapping[int, str]
    multi_label: bool
    num_res_blocks: int
    weights: str


@dataclass(frozen=True)
class Description:
    """All that is known of a network: its architecture, and what its inputs and outputs mean (see `Stated`).

    source: the file or library that it came from. multi_label: None of a UNet.
    """

    architecture: Architecture
    timesteps: int
    schedule: str
    rescale_timesteps: bool
    pixel_range: tuple[float, float]
    channel_names: tuple[str, ...]
    labels: Mapping[int, str]
    source: str
    multi_label: bool | None = None

    def __post_init__(self) -> None:
        low, high = self.pixel_range
        if not low < high:
            raise ConfigError(f"pixel_range: expected (lowest, highest), got {self.pixel_range}")
        check_count(timesteps=self.timesteps)
        if len(self.channel_names) != self.architecture.in_channels:
            raise ConfigError(
                f"channel_names: expected {self.architecture.in_channels} names, one for each input channel, "
                f"got {list(self.channel_names)}"
            )
        if (self.multi_label is None) != (self.architecture.kind == "unet"):
            raise ConfigError(
                f"multi_label: expected {'none, for a UNet' if self.multi_label is not None else 'True or False'}, "
                f"got {self.multi_label}"
            )
        if self.multi_label is False and self.architecture.num_classes == 1:
            raise ConfigError("multi_label: expected True for a single logit, whose softmax is always 1, got False")
        wrong = [label for label in self.labels if not 0 <= label < (self.architecture.num_classes or 0)]
        if wrong:
            raise ConfigError(
                f"labels: expected numbers below {self.architecture.num_classes or 0}, the classes of the network, "
                f"got {wrong[0]}"
            )
        self.diffusion()

    @property
    def learns_sigma(self) -> bool:
        """Whether the second half of a UNet's output is about the variance, and not the noise."""
        return self.architecture.out_channels == 2 * self.architecture.in_channels

    def diffusion(self) -> Diffusion:
        """The process that the network was trained on."""
        return Diffusion(self.timesteps, self.schedule, self.rescale_timesteps)

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], as everywhere in this package, in the range that the network was trained on.

        Noise is added to what this returns, and never before.
        """
        low, high = self.pixel_range
        return images if (low, high) == (-1, 1) else low + (images + 1) * ((high - low) / 2)

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Raises ValueError, KeyError or TypeError where the text is not of `to_json`."""
        content = json.loads(text)
        shape = content["architecture"]
        for key in ("channel_mult", "attention_downsample"):
            shape[key] = tuple(shape[key])
        content["architecture"] = Architecture(**shape)
        for key in ("pixel_range", "channel_names"):
            content[key] = tuple(content[key])
        content["labels"] = {int(label): meaning for label, meaning in content["labels"].items()}
        return cls(**content)


class Loaded(NamedTuple):
    """A network in evaluation mode, float32, on the CPU; and its description."""

    network: Network
    description: Description


def load(path: str | Path, *, kind: Kind | Literal["auto"] = "auto", **stated: Unpack[Stated]) -> Loaded:
    """Read a UNet or a classifier.

    path: a .pt, .pth, .bin or .safetensors file, or the folder of a diffusers `UNet2DModel`. Nothing in it is executed.
    kind: what is expected; another network is refused. stated: see `Stated`; a file that `save` wrote needs none.
    Raises CheckpointError where the file can't be read or is no such network, and ConfigError, naming all that is
    missing, where more must be stated.
    """
    path = Path(path)
    if path.is_dir():
        loaded = _from_folder(path, stated)
    else:
        state, recorded = _read(path, stated.get("weights"))
        loaded = _recorded(path, state, recorded, stated) if recorded else _inferred(path, state, stated)
    found = loaded.description.architecture.kind
    if kind not in ("auto", found):
        raise CheckpointError(f"{path}: expected a {kind}, found a {found}")
    return loaded


def save(path: str | Path, loaded: Loaded) -> None:
    """Write a network and its description as safetensors, in one step; `load` reads them back."""
    write_tensors(path, loaded.network.state_dict(), {_METADATA: loaded.description.to_json()})


def describes_itself(path: str | Path) -> bool:
    """Whether a safetensors file is one that `save` wrote. Raises what safetensors does where it can't be read."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return _METADATA in (file.metadata() or {})


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, in one step: see `files.atomic_write`."""
    from safetensors.torch import save

    # Its save_file makes files that only their owner can read.
    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)
    atomic_write_bytes(path, content)


def from_diffusers(model: nn.Module, **stated: Unpack[Stated]) -> Loaded:
    """The network of a diffusers `UNet2DModel`. stated: see `Stated`; the heads are known."""
    config: Any = model.config
    return _translated("diffusers", *peers.from_diffusers(dict(config), model.state_dict()), stated)


def from_monai(model: nn.Module, **stated: Unpack[Stated]) -> Loaded:
    """The network of a MONAI `DiffusionModelUNet` in two dimensions. stated: see `Stated`; the heads are known."""
    return _translated("MONAI", *peers.from_monai(model), stated)


def to_diffusers(loaded: Loaded) -> nn.Module:
    """The diffusers `UNet2DModel` that computes the same; class_labels are rows of the class table."""
    config, state = peers.to_diffusers(loaded.description.architecture, loaded.network.state_dict())
    model: nn.Module = import_module("diffusers").UNet2DModel(**config)
    model.load_state_dict(state)
    return model.eval()


def to_monai(loaded: Loaded) -> nn.Module:
    """The MONAI `DiffusionModelUNet` that computes the same; class_labels are rows of the class table."""
    config, state = peers.to_monai(loaded.description.architecture, loaded.network.state_dict())
    model: nn.Module = import_module("monai.networks.nets").DiffusionModelUNet(**config)
    model.load_state_dict(state)
    return model.eval()


def _describe(name: str, architecture: Architecture, stated: Stated) -> Description:
    """An architecture and what is stated of it. Raises ConfigError with one sentence that lists all that is missing."""
    unknown = set(stated) - set(Stated.__annotations__)
    if unknown:
        raise TypeError(f"unexpected keyword {min(unknown)!r}, expected {', '.join(Stated.__annotations__)}")
    heads = ("num_head_channels",) if architecture.kind == "classifier" else ("num_heads", "num_head_channels")
    if architecture.kind == "classifier" and "num_heads" in stated:
        raise ConfigError(f"{name}: num_heads: a classifier's heads are stated by num_head_channels (published: 64)")
    if "num_heads" in stated and "num_head_channels" in stated:
        raise ConfigError(f"{name}: num_heads, num_head_channels: expected one of the two, got both")
    attention = {key: stated.get(key) for key in (*heads, "new_attention_order") if key in stated}
    if architecture.new_attention_order is not None and attention:
        raise ConfigError(f"{name}: {next(iter(attention))}: is known from the network and can't be stated")
    architecture = replace(architecture, **attention)  # type: ignore[arg-type]

    missing: list[str] = []
    if not (architecture.num_heads or architecture.num_head_channels):
        missing.append(f"{' or '.join(heads)} (any number of heads has these shapes)")
    if architecture.new_attention_order is None:
        missing.append("new_attention_order (whether heads are split after q, k, v, in the same tensor)")
    classes = "rows of the class table" if architecture.kind == "unet" else "logits"
    reasons = {
        "timesteps": "T of the process trained on, which the noise levels are fractions of",
        "schedule": "linear or cosine, which says how noisy step t is",
        "rescale_timesteps": "whether the network is told t or t * 1000 / T",
        "pixel_range": "that of the images trained on, (-1, 1) or (0, 1)",
        "channel_names": f"what the {architecture.in_channels} input channels are, in order",
    }
    if architecture.num_classes:
        reasons["labels"] = f"what the {architecture.num_classes} {classes} mean"
    if architecture.kind == "classifier":
        reasons["multi_label"] = "whether its logits go through a sigmoid each, or through a softmax"
    missing += [f"{key} ({reason})" for key, reason in reasons.items() if not _is_stated(stated.get(key))]
    if missing:
        raise ConfigError(
            f"{name}: state {', '.join(missing)}: tensors don't tell, and a wrong value gives wrong results in silence"
        )
    return Description(
        architecture=architecture,
        timesteps=stated["timesteps"],
        schedule=stated["schedule"],
        rescale_timesteps=stated["rescale_timesteps"],
        pixel_range=stated["pixel_range"],
        channel_names=tuple(stated["channel_names"]),
        labels=dict(stated.get("labels", {})),
        multi_label=stated.get("multi_label"),
        source=name,
    )


def _is_stated(value: object) -> bool:
    return value is not None and value != () and value != {}


def _inferred(path: Path, state: dict[str, Tensor], stated: Stated) -> Loaded:
    if all((path.parent / name).exists() for name in ("config.yaml", "dataset.json")):
        # Its pixels may be folded into channels, which no tensor tells.
        raise CheckpointError(f"{path}: is part of a run, whose config.yaml describes it; open it with Run")
    _refuse_other_networks(path, state)
    shapes = {name: list(value.shape) for name, value in state.items()}
    try:
        architecture = infer(shapes, stated.get("num_res_blocks"))
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from error
    description = _describe(str(path), architecture, stated)
    return Loaded(_filled(description.architecture, state, str(path)), replace(description, source=path.name))


def _recorded(path: Path, state: dict[str, Tensor], text: str, stated: Stated) -> Loaded:
    if stated:
        raise ConfigError(f"{path}: describes itself, expected no keyword, got {next(iter(stated))}")
    try:
        description = Description.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its description can't be read ({error}); convert it again") from error
    return Loaded(_filled(description.architecture, state, str(path)), description)


def _translated(name: str, architecture: Architecture, state: dict[str, Tensor], stated: Stated) -> Loaded:
    description = _describe(name, architecture, stated)
    return Loaded(_filled(description.architecture, state, name), description)


def _from_folder(path: Path, stated: Stated) -> Loaded:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        found = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected the folder of a diffusers network, with config.json") from error
    if found != "UNet2DModel":
        raise CheckpointError(f"{path}: expected a diffusers UNet2DModel, found {found}")
    files = [path / f"diffusion_pytorch_model{suffix}" for suffix in (".safetensors", ".bin")]
    state, _ = _read(next((file for file in files if file.exists()), files[0]))
    try:
        return _translated(str(path), *peers.from_diffusers(config, state), stated)
    except KeyError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error.args[0]} is missing") from error


def _filled(architecture: Architecture, state: dict[str, Tensor], name: str) -> Network:
    """The network with these tensors, which become its parameters: no second copy of them is made."""
    network = architecture.build()
    difference = first_difference(network, {key: list(value.shape) for key, value in state.items()})
    if difference:
        raise CheckpointError(f"{name}: does not fit the network that its keys suggest: {difference}")
    network.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return network.eval()


def _read(path: Path, weights: str | None = None) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of a file, wrappers and prefixes taken off, and the description that `save` wrote with them."""
    if not path.exists():
        raise CheckpointError(f"{path}: is missing")
    try:
        if path.suffix == ".safetensors":
            content, recorded = _read_safetensors(path)
        else:
            content, recorded = torch.load(path, map_location="cpu", weights_only=True), None
    except Exception as error:  # the readers raise whatever broken bytes lead to
        # torch's own message names what it refuses to build, among advice to build it nevertheless.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise CheckpointError(
                f"{path}: holds more than tensors ({refused[1]}), which could run code when read, and is refused; "
                "save the network's state_dict() alone"
            ) from error
        raise CheckpointError(f"{path}: can't be read; it is truncated or no checkpoint") from error
    state = _state(path, content, weights)
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not finite; the training had diverged or the file is damaged")
    return state, recorded


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get(_METADATA)  # noqa: SIM118


def _state(path: Path, content: object, weights: str | None) -> dict[str, Tensor]:
    """The state dict in what a file holds."""
    while isinstance(content, Mapping) and content:
        if {"state", "param_groups"} <= content.keys():
            raise CheckpointError(
                f"{path}: is an optimizer's state and no network; load the model or ema file beside it"
            )
        held = [name for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
        if weights in held:
            held, weights = [weights], None
        elif all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
            if weights is not None:
                raise ConfigError(f"{path}: weights: the file has no {weights!r}")
            return _without_prefixes(content)
        if len(held) > 1:
            raise ConfigError(f"{path}: weights: expected one of {', '.join(held)}, which the file holds, got none")
        content = content[held[0]] if held else None
    raise CheckpointError(f"{path}: holds no state dict, expected tensors by name, or such in {', '.join(_WRAPPERS)}")


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel and torch.compile put before all of them."""
    names = list(state)
    while prefix := next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state.values(), strict=True))


def _refuse_other_networks(path: Path, state: Mapping[str, Tensor]) -> None:
    if "input_blocks.0.0.weight" in state:
        return
    if "middle_block.resnet_1.norm1.weight" in state:
        raise CheckpointError(
            f"{path}: is a MONAI DiffusionModelUNet, whose heads and norms its tensors don't tell; load it into the "
            "network that it was saved from and give that to from_monai"
        )
    if "mid_block.resnets.0.norm1.weight" in state:
        raise CheckpointError(
            f"{path}: is a diffusers network without its configuration; give the folder that has config.json"
        )
    if "conv1.weight" in state and "fc.weight" in state:
        raise CheckpointError(f"{path}: is a ResNet, which is not told the noise level and can't serve as classifier")
    raise CheckpointError(
        f"{path}: holds no network of guided-diffusion's layout, expected input_blocks.0.0.weight, "
        f"found {next(iter(state))}"
    )
