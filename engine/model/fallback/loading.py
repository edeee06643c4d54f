"""A model's weights into the library's own modules, and then its linears into packed ones."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as library_logging

from engine.model.fallback.attention import Route
from engine.model.fallback.settings import LIBRARY_ERRORS, first_line, refusal
from engine.model.weights import DummySource
from kernels.linear import PackedLinear
from protocol.errors import ConfigError
from runtime.models.weight_files import weight_files


class PackedModule(torch.nn.Module):
    """A PackedLinear in the place of a torch.nn.Linear, for inputs of any number of dimensions.

    `weight` has the shape and dtype of the real one and no content: a model that asks for them is answered, one that
    computes with it fails, and at load, not in silence."""

    def __init__(self, linear: torch.nn.Linear, *, wide: bool = False) -> None:
        super().__init__()
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.empty_like(weight, device="meta")
        self.packed = PackedLinear(weight, bias, wide=wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


def load_checkpoint(
    config: PretrainedConfig,
    folder: Path,
    route: Route,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], None],
) -> PreTrainedModel:
    """Safetensors only. Raises ConfigError where the checkpoint is not the model that config.json says."""
    files = weight_files(folder)
    progress(f"transformers loads {len(files)} weight file{'s' if len(files) > 1 else ''}")
    library_logging.disable_progress_bar()  # a node's log is no terminal
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=route.value,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below by name
        )
        loaded: PreTrainedModel = model.to(device).eval()
    except LIBRARY_ERRORS as error:
        raise refusal(config, f"its weights in {folder} cannot be loaded: {first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        found = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[kind])
        if found:
            raise ConfigError(f"{folder}: {kind.replace('_keys', '')} tensor {found[0]} ({len(found)} in all)")
    return loaded


def make_up_weights(
    config: PretrainedConfig, seed: int, route: Route, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Weights from a seed, the same on every machine. Scales (vectors called weight) are ones. Raises ConfigError where
    the model cannot be built, for want of memory, say."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=route.value, trust_remote_code=False
        )
        _fill(model, DummySource(seed, dtype, torch.device("cpu")))
        return model.to(device).eval()
    except LIBRARY_ERRORS as error:
        raise refusal(config, f"its weights cannot be made up: {first_line(error)}") from error


def _fill(model: PreTrainedModel, source: DummySource) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.copy_(source.read(name, *parameter.shape))


def called_linears(model: PreTrainedModel, run: Callable[[], object]) -> frozenset[str]:
    """Names of the torch.nn.Linear modules that `run`, a forward pass, calls as modules."""
    called: set[str] = set()
    linears: dict[torch.nn.Module, str] = {
        module: name for name, module in model.named_modules() if type(module) is torch.nn.Linear
    }

    def note(module: torch.nn.Module, _: object) -> None:
        called.add(linears[module])

    handles = [module.register_forward_pre_hook(note) for module in linears]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(called)


def pack_linears(model: PreTrainedModel, names: Collection[str]) -> None:
    """Put PackedModules in the place of these linears, one after another. The head's results are float32 from then on:
    logits of half precision would make ties of distinct candidates."""
    head = model.get_output_embeddings()
    for name in sorted(names):
        parent = model.get_submodule(name.rpartition(".")[0])
        linear = model.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear), "called_linears names no others"
        if linear is head:
            packed = PackedModule(linear, wide=True)
        elif linear.weight.is_cpu:
            packed = PackedModule(linear)
        else:
            continue  # there is no packed form on this device
        setattr(parent, name.rpartition(".")[2], packed)
