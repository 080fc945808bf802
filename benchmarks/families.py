"""Every family of causal language models that transformers knows, as a tiny random model built from its config.

`tiny_family("llama")` gives one; run as a script, the module pools each and writes which pass pooling's check.

    python benchmarks/families.py [FAMILY ...] [--out benchmarks/results/pooling_families.csv]
"""
from __future__ import annotations

import argparse
import inspect
import warnings
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from carma_lib.files import whole_file
from carma_lib.pooling import _checked, pooling_grid

# What a config calls its sizes, and how small they are here. Configs take those names that they know.
SIZES = {
    300: ("vocab_size", "vocab_size_per_layer_input"),
    128: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_sequence_length"),
    64: ("intermediate_size", "ffn_dim", "d_ff", "dff", "n_inner", "ffn_hidden_size", "decoder_ffn_dim",
         "encoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
         "mlp_hidden_size", "shared_intermediate_size", "expert_ffn_hidden_size"),
    32: ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim", "attention_hidden_size",
         "word_embed_proj_dim", "lru_width", "embedding_dim"),
    16: ("q_lora_rank", "kv_lora_rank", "rotary_dim"),
    8: ("head_dim", "v_head_dim", "qk_nope_head_dim", "hidden_size_per_layer_input", "mamba_d_head", "mamba_headdim",
        "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim", "d_kv", "ssm_state_size", "mamba_d_state",
        "state_size", "index_head_dim", "global_head_dim", "mamba_n_heads", "n_mamba_heads", "mamba_num_heads"),
    4: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads",
        "qk_rope_head_dim", "laurel_rank", "chunk_size", "mamba_chunk_size", "time_step_rank", "index_n_heads"),
    2: ("num_key_value_heads", "n_head_kv", "num_kv_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk",
        "moe_k", "top_k_experts", "linear_num_key_heads", "index_topk", "num_global_key_value_heads"),
    1: ("mamba_n_groups", "mamba_ngroups", "n_groups", "n_group", "topk_group", "mamba_num_groups",
        "first_k_dense_replace", "num_mem_blocks"),
    0: ("num_kv_shared_layers", "num_nextn_predict_layers"),
}
SMALL = {name: size for size, names in SIZES.items() for name in names}


ROTARY = dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8, num_key_value_heads=4)
HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
CHANGES = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
                     "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), ROTARY),
    **dict.fromkeys(("codegen", "gptj"), dict(rotary_dim=4)),
    "gpt_neo": dict(num_layers=4, attention_types=[[["global", "local"], 2]]),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1, state_size=8),
    "zamba2": dict(layers_block_type=HYBRID, hybrid_layer_ids=[1, 3], mamba_headdim=8, n_mamba_heads=8, adapter_rank=4,
                   attention_hidden_size=64, attention_head_dim=16),
}


def tiny_config(family: str, **changes):
    """The config of a family with about four blocks of width 32 and a vocabulary of 300."""
    return _small(type(AutoConfig.for_model(family)), **{**CHANGES.get(family, {}), **changes})


def _small(config_class: type, **changes):
    known = set(inspect.signature(config_class.__init__).parameters) | set(config_class().to_dict())
    parts = {name: _small(part).to_dict() for name, part in getattr(config_class, "sub_configs", {}).items()
             if hasattr(part, "model_type") and name in known}
    sizes = {name: size for name, size in SMALL.items() if name in known}
    tokens = {name: 1 for name in known if name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return config_class(**{**sizes, **tokens, **parts, **changes})


def tiny_family(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A random causal language model of a family in evaluation mode; the same seed gives the same weights."""
    config = tiny_config(family, **changes)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def pooled_or_refused(family: str) -> dict[str, str]:
    """The row of a family in the table: whether all its start layers pass the check of pooling, and why not."""
    row = {"family": family, "model": "", "pools": "", "together": "", "reason": ""}
    try:
        model = tiny_family(family)
        row["model"] = type(model).__name__
        ids = torch.tensor([[160, 161, 161, 162], [1, 163, 164, 165]])
        mask, layers = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]), range(model.config.get_text_config().num_hidden_layers)
    except Exception as error:
        return row | {"pools": "not built", "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    try:
        pooling_grid(model, ids, mask, torch.tensor([[-1, 0, 0, -1]] * 2), start_layers=layers)
        return row | {"pools": "yes", "together": "yes" if _checked[model][1] else "no"}
    except ValueError as error:
        return row | {"pools": "no", "reason": str(error).split("): ", 1)[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--out", type=Path, help="write the table to this CSV file too")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = pd.DataFrame(map(pooled_or_refused, arguments.families))
    print(table.to_string(index=False))
    print(table.pools.value_counts().to_string())
    if arguments.out:
        with whole_file(arguments.out) as path:
            table.to_csv(path, index=False)


if __name__ == "__main__":
    main()
