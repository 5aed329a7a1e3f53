"""The language model, its LoRA adapter, and the one way to run it."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from mpctf_secure.aggregation.lora import A_SUFFIX, B_SUFFIX, Schema, Vector, join_flat, split_flat
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute
from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.training.batching import Batch, pack
from mpctf_secure.training.data import ChatTokenizer, Example

_SHORT = 256


def base_dtype(precision: str = "auto") -> torch.dtype:
    """As it is named; auto: bfloat16 where the hardware multiplies it faster than float32."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_base(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The causal language model in a local transformers folder, frozen; EnvironmentUnfitError where there is none."""
    try:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise EnvironmentUnfitError(reason, hint="pip install 'mpctf-secure[gpu]', or other compute options") from error
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        hint = "name a folder with config.json and weights, and compute options that the model has"
        raise EnvironmentUnfitError(f"{folder}: {reason}", hint=hint) from error
    return base.requires_grad_(False)


def _options(compute: Compute, dtype: torch.dtype) -> dict[str, Any]:
    """Of transformers, for what a site file asks for."""
    options: dict[str, Any] = {}
    if compute.attention == "flash":
        options["attn_implementation"] = "flash_attention_2"
    if compute.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    return options


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer in a local transformers folder; EnvironmentUnfitError where there is none."""
    try:
        tokenizer: ChatTokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise EnvironmentUnfitError(f"{folder}: {reason}", hint="the folder needs the model's tokenizer") from error
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """Any token will do: padding lies behind every answer and is never predicted."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def load_adapter_model(folder: Path, lora: Lora, compute: Compute) -> PeftModel:
    """Base model with a LoRA adapter, on this process's GPU where there is one."""
    dtype = base_dtype(compute.precision)
    model = add_lora(load_base(folder, dtype, **_options(compute, dtype)), lora)
    if compute.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compute.sharded and torch.distributed.is_initialized():  # among one process there is nothing to divide
        _shard(model, base_blocks=set(model.get_base_model()._no_split_modules or ()))
    return model.to("cuda") if torch.cuda.is_available() and not compute.four_bit else model


def _shard(model: PeftModel, base_blocks: set[str]) -> None:
    """Divide the frozen base among the processes, block by block (FSDP2); each has the whole adapter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    adapter = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in model.modules():
        if type(module).__name__ in base_blocks:
            fully_shard(module, mesh=mesh, ignored_params=adapter)
    fully_shard(model, mesh=mesh, ignored_params=adapter)


def add_lora(base: PreTrainedModel, lora: Lora) -> PeftModel:
    """The base with LoRA layers in float32; UsageError where a target is not in the model."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        model = get_peft_model(base, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise UsageError(f"target_modules: {error}", hint='"all-linear" fits every model') from error
    for name, _ in adapter_schema(model):
        if not name.endswith((A_SUFFIX, B_SUFFIX)):
            raise UsageError(f"target_modules: {name} is no factor A or B", hint="name linear layers only")
    _leave_casts_to_autocast(model)
    return model


def _leave_casts_to_autocast(model: PeftModel) -> None:
    """PEFT would copy every layer's input to float32, and autocast that back, and autograd keep it: the same bits."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False


def adapter_schema(model: PeftModel) -> Schema:
    """Names and shapes in canonical order."""
    return sorted((name, tuple(tensor.shape)) for name, tensor in _adapter_tensors(model).items())


def read_adapter(model: PeftModel) -> Vector:
    """A copy of the adapter as one float32 vector in the order of `adapter_schema`."""
    tensors = {name: tensor.float().cpu().numpy() for name, tensor in _adapter_tensors(model).items()}
    return join_flat(tensors, adapter_schema(model))


def write_adapter(model: PeftModel, flat: Vector) -> None:
    """The inverse of `read_adapter`; ValueError where the length is wrong."""
    tensors = _adapter_tensors(model)
    for name, values in split_flat(flat, adapter_schema(model)).items():
        tensors[name].copy_(torch.from_numpy(values))


def train_only(model: PeftModel, names: Collection[str]) -> None:
    """Let these tensors of the schema be trained, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.replace(f".{model.active_adapter}.", ".") in names)


def _adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The live tensors, detached, under the names that PEFT saves them by."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's inputs must be."""
    return next(model.parameters()).device


def answer_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (answer tokens, vocabulary) in the order of `batch.targets`.

    The head's input is narrowed by a hook, so that the full forward of any architecture runs, and yet no logits are
    computed for prompts and padding.
    """

    def narrow(_: torch.nn.Module, hidden: tuple[torch.Tensor]) -> torch.Tensor:
        return hidden[0][:, :-1][batch.predicts]

    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(narrow)
    try:
        with _autocast(model), attention(model, batch):
            logits: torch.Tensor = model(
                input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False
            ).logits
    finally:
        hook.remove()
    return logits


@torch.no_grad()
def check_keeps_rows_apart(model: torch.nn.Module) -> None:
    """UsageError for a model in which packed rows see each other: many only look at the order, not at `positions`.

    Where the mask is right the second row's logits do not depend on the first, to the last bit.
    """
    second = Example((3, 4, 5, 6), 1)
    model.eval()
    one, other = (
        answer_logits(model, pack([Example((first, 2), 1), second], device_of(model)))[1:] for first in (0, 1)
    )
    model.train()
    if not torch.equal(one, other):
        raise UsageError("compute.packing: in this model packed rows see each other", hint="packing: false")


def _autocast(model: torch.nn.Module) -> torch.autocast:
    """The float32 adapter multiplies as bfloat16 where the base is bfloat16: casting activations up costs more."""
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=_is_bfloat16(model))


def _is_bfloat16(model: torch.nn.Module) -> bool:
    return next(model.parameters()).dtype == torch.bfloat16


def attention(model: torch.nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """On CPU the fused kernel's bfloat16 backward is slow: up to this length plain products take less than half."""
    plain = device_of(model).type == "cpu" and _is_bfloat16(model) and batch.input_ids.shape[1] <= _SHORT
    return _plain_attention() if plain else nullcontext()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """In bfloat16 throughout; left to itself torch multiplies in float32 here, on a CPU too."""
    cuda = torch.backends.cuda
    allowed = cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(allowed)
