"""A tiny Qwen2 twice: in transformers with full attention maps (the oracle), and in megatron-core's GPTModel on ranks.

Run by `python tests/megatron_ranks.py RANK WORLD FOLDER`, one process a rank: every case of `CASES` on the weights and
the batch in FOLDER, results to FOLDER/WORLD-RANK.pt.
"""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from verl_avar.attention.record import probe
from verl_avar.objective import agto_terms
from verl_avar.roles import Role, query_mask

SIZES = {"layers": 2, "hidden": 32, "heads": 4, "groups": 2, "ffn": 48, "vocab": 64}
ALPHA, BETA = 0.7, 0.4
LENGTHS = (24, 18)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {
    "plain": {},
    "full recomputation": FULL,
    "selective recomputation": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "packed": FULL,
    "last layer": FULL,
    "sequence parallel": {"sequence_parallel": True, **FULL},
}


def build_oracle():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=SIZES["vocab"],
        hidden_size=SIZES["hidden"],
        intermediate_size=SIZES["ffn"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["groups"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:  # attention that differs between keys
                weight.normal_(std=0.6)
            if "embed_tokens" in name:  # the norm of small embeddings has gradients too steep for float32
                weight.normal_()
    return model


def build_batch() -> dict[str, torch.Tensor]:
    """ids, labels [2, 24] and roles of two padded samples."""
    longest = max(LENGTHS)
    ids = torch.randint(1, SIZES["vocab"], (2, longest), generator=torch.Generator().manual_seed(1))
    roles = torch.full((2, longest), int(Role.OTHER), dtype=torch.uint8)
    for b, length in enumerate(LENGTHS):
        roles[b, :4], roles[b, 4:9], roles[b, 9:12] = Role.SYSTEM, Role.VISUAL, Role.USER
        roles[b, 13:length] = Role.RESPONSE
    return {"ids": ids, "labels": ids.roll(-1, dims=1), "roles": roles}


def language_loss(losses: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of both samples. losses: [2, T]."""
    within = torch.arange(losses.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return (losses * within).sum() / within.sum()


def shard(state: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """transformers' Qwen2 tensors (weights or gradients) as GPTModel's of one tensor-parallel rank."""

    def part(tensor, dim=0):
        return tensor.chunk(world, dim=dim)[rank]

    def qkv(attention, kind):
        q, k, v = (state[f"{attention}.{name}_proj.{kind}"] for name in "qkv")
        groups = SIZES["groups"]
        rows = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in (q, k, v)]
        return part(torch.cat(rows, dim=1).flatten(0, 1))

    out = {
        "embedding.word_embeddings.weight": part(state["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": part(state["lm_head.weight"]),
    }
    for i in range(SIZES["layers"]):
        theirs, ours = f"model.layers.{i}", f"decoder.layers.{i}"
        gate, up = (part(state[f"{theirs}.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        out |= {
            f"{ours}.input_layernorm.weight": state[f"{theirs}.input_layernorm.weight"],
            f"{ours}.pre_mlp_layernorm.weight": state[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.self_attention.linear_qkv.weight": qkv(f"{theirs}.self_attn", "weight"),
            f"{ours}.self_attention.linear_qkv.bias": qkv(f"{theirs}.self_attn", "bias"),
            f"{ours}.self_attention.linear_proj.weight": part(state[f"{theirs}.self_attn.o_proj.weight"], dim=1),
            f"{ours}.mlp.linear_fc1.weight": torch.cat((gate, up)),
            f"{ours}.mlp.linear_fc2.weight": part(state[f"{theirs}.mlp.down_proj.weight"], dim=1),
        }
    return out


class Norm(torch.nn.RMSNorm):
    """megatron-core's own, which wraps torch's too, refuses sequence parallelism."""

    def __init__(self, config, hidden_size, eps):
        super().__init__(hidden_size, eps=eps)


def build_gpt(state, rank, world, **options):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from verl_avar.training.megatron.core_attention import SdpaCoreAttention
    from verl_avar.training.megatron.measuring import measure_layer_spec

    config = TransformerConfig(
        num_layers=SIZES["layers"],
        hidden_size=SIZES["hidden"],
        num_attention_heads=SIZES["heads"],
        num_query_groups=SIZES["groups"],
        ffn_hidden_size=SIZES["ffn"],
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=world,
        **options,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    block = TransformerBlockSubmodules(layer_specs=[layer] * SIZES["layers"], layer_norm=Norm)
    model = GPTModel(
        config=config,
        transformer_layer_spec=measure_layer_spec(block, stock=SdpaCoreAttention),
        vocab_size=SIZES["vocab"],
        max_sequence_length=max(LENGTHS),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    missing, unexpected = model.load_state_dict(shard(state, rank, world), strict=False)
    assert not unexpected and all("_extra_state" in name for name in missing), (missing, unexpected)
    return model


def run_case(name: str, model, batch) -> dict:
    """Masses, objective, loss and gradients of one training pass."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    from verl_avar.training.megatron.layer_objective import LayerObjective, layer_objective
    from verl_avar.training.packing import pack, unpack

    ids, labels, roles = batch["ids"], batch["labels"], batch["roles"]
    queries, lengths = query_mask(roles, "response"), list(LENGTHS)
    packed, layers = None, [SIZES["layers"] - 1] if name == "last layer" else None
    seen, asked = roles, queries
    if name == "packed":
        ids, labels, seen, asked = (pack(rows, lengths) for rows in (ids, labels, roles, queries))
        borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        packed = PackedSeqParams("thd", borders, borders, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))

    def rows(mass):
        return unpack(mass, lengths) if packed is not None else mass

    def terms(visual, system):
        return agto_terms(rows(visual), rows(system), roles)

    with probe(seen, asked, layers) as record:
        agto = LayerObjective(
            record,
            terms,
            ALPHA,
            BETA,
            totals=(2, 2),
            layers=1 if layers else SIZES["layers"],
            group=get_tensor_model_parallel_group(),
        )
        with layer_objective(agto):
            losses = model(ids, torch.arange(ids.shape[1])[None], None, labels=labels, packed_seq_params=packed)
            if packed is not None:
                losses = unpack(losses[None, :, None], lengths)[0, :, 0]
            loss = agto.join(language_loss(losses))
            (3.0 * loss).backward()  # a factor, as fp16's loss scale or a schedule's number of micro-batches
    gradients = {key: p.grad / 3.0 for key, p in model.named_parameters() if p.grad is not None}
    if model.config.sequence_parallel:  # each rank's norms saw its part of the tokens
        for key in gradients:
            if "layernorm" in key:
                torch.distributed.all_reduce(gradients[key])
    return {
        "loss": loss.item(),
        "masses": torch.stack([rows(record.mass(role)) for role in record.of], dim=-1),
        "gradients": gradients,
        "layers": record.layers,
    }


def run_engine(model, batch) -> dict[str, dict]:
    """A training and an inference pass of the AVAR engine, packed and padded, with verl's own forward step and loss.

    megatron-core's schedule wants a CUDA device: its loop without a pipeline stands in for it. So does a built model
    for the bridge.
    """
    from types import SimpleNamespace

    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.megatron import transformer_impl
    from verl.workers.utils.losses import sft_loss

    from verl_avar.training.config import AvarConfig
    from verl_avar.training.megatron.config import AvarMcoreEngineConfig
    from verl_avar.training.megatron.engine import AvarMegatronEngine

    def schedule(forward_step_func, data_iterator, model, num_microbatches, forward_only, **_):
        results = []
        for _ in range(num_microbatches):
            output, loss_func = forward_step_func(data_iterator, model[0])
            loss, result = loss_func(output)
            if not forward_only:
                (loss / num_microbatches).backward()
            results.append(result)
        return results

    def nested(rows):
        return torch.nested.as_nested_tensor(
            [row[:n] for row, n in zip(rows, LENGTHS, strict=True)], layout=torch.jagged
        )

    class Engine(AvarMegatronEngine):
        def __init__(self, packed: bool):
            self.avar = AvarConfig(alpha=ALPHA, beta=BETA)
            self.engine_config = AvarMcoreEngineConfig(use_remove_padding=packed, avar=self.avar)
            self.model_config = SimpleNamespace(
                hf_config=SimpleNamespace(architectures=["Qwen2ForCausalLM"]),
                tokenizer=SimpleNamespace(pad_token_id=0),
                mtp=SimpleNamespace(enable=False),
            )
            self.module, self.tf_config, self.enable_routing_replay = [model], model.config, False
            self._layers, self._open_probes, self._micro_batch = list(range(SIZES["layers"])), ExitStack(), None
            self.lr_scheduler = SimpleNamespace(num_steps=0)

        def _roles(self, data):
            return nested(batch["roles"])

    transformer_impl.get_forward_backward_func = lambda: schedule
    results = {}
    for packed in (True, False):
        data = tu.get_tensordict(
            {"input_ids": nested(batch["ids"]), "loss_mask": nested((batch["roles"] == Role.RESPONSE).long())},
            non_tensor_dict={
                "use_dynamic_bsz": False,
                "micro_batch_size_per_gpu": 1,
                "temperature": 1.0,
                "pad_mode": "no_padding",
            },
        )
        engine = Engine(packed)
        scores = engine.forward_backward_batch(data.copy(), None, forward_only=True)["model_output"]
        model.zero_grad()
        output = engine.forward_backward_batch(data.copy(), partial(sft_loss, config=None))
        results["packed" if packed else "padded"] = {
            "scores": {name: list(rows.unbind()) for name, rows in scores.items()},
            "loss": sum(output["loss"]),
            "metrics": {name: value[0] for name, value in output["metrics"].items()},
            "gradients": {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None},
        }
    return results


@contextmanager
def ranks_of_megatron(rank: int, world: int, folder: Path):
    """This process as a tensor-parallel rank. megatron-core asks CUDA for random states and for the device of its
    rotary embedding; the CPU answers."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    torch.cuda.current_device = lambda: torch.device("cpu")
    random._get_cuda_rng_state = lambda *args, **options: None
    random._set_cuda_rng_state = lambda *args, **options: None
    random.get_cuda_rng_tracker().set_states({"model-parallel-rng": None})
    store = f"file://{folder}/store-{world}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    given = torch.load(folder / "given.pt")
    with ranks_of_megatron(rank, world, folder):
        build = partial(build_gpt, given["state"], rank, world)
        results = {}
        for name, options in CASES.items():
            if name != "sequence parallel" or world > 1:
                results[name] = run_case(name, build(**options).train(), given["batch"])
        if world > 1:
            results["engine"] = run_engine(build(**FULL).train(), given["batch"])
        torch.save(results, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
