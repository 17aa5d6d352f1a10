"""What an option is called here that people know by another name: for calls and for the command line."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# The name here, and its names elsewhere: in RecBole, RecTools, transformers, scikit-learn and papers.
HABITS = {
    "num_items": "n_items item_num itemnum vocab_size catalog_size",
    "max_len": "maxlen max_length max_seq_len max_seq_length seq_len session_max_len max_position_embeddings",
    "hidden": "hidden_size hidden_dim hidden_units d_model dim embed_dim embedding_dim embedding_size emb_size n_factors factors",
    "layers": "num_layers n_layers n_layer num_blocks n_blocks blocks num_hidden_layers depth",
    "heads": "num_heads n_heads n_head nhead num_attention_heads",
    "rank": "r table_rank",
    "feedforward": "inner_size intermediate_size ffn_dim dim_feedforward",
    "activation": "hidden_act act activation_function",
    "norm": "norm_first layer_norm",
    "hidden_dropout": "dropout dropout_rate dropout_p hidden_dropout_prob",
    "attention_dropout": "dropout dropout_rate attn_dropout attn_dropout_prob attention_probs_dropout_prob",
    "loss": "loss_type loss_function loss_fn criterion objective",
    "negatives": "n_negatives num_negatives neg_samples num_samples negative_samples",
    "calibration": "gbce_t t",
    "batch_size": "batch bs train_batch_size per_device_train_batch_size recommend_batch_size",
    "learning_rate": "lr eta step_size",
    "schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "weight_decay": "wd l2 l2_reg l2_emb reg",
    "average": "ema ema_decay",
    "clip": "grad_clip clip_grad max_grad_norm clip_grad_norm gradient_clip_val",
    "epochs": "epoch n_epochs num_epochs max_epochs num_train_epochs n_iter max_iter iterations",
    "patience": "early_stopping early_stopping_patience stopping_step",
    "seed": "random_state random_seed",
    "precision": "amp fp16 bf16",
    "accelerator": "device gpu cuda use_gpu",
    "devices": "n_gpus num_gpus",
    "threads": "n_jobs num_threads n_threads",
    "progress": "verbose show_progress progress_bar enable_progress_bar",
    "logger": "log_with report_to",
    "out": "output output_dir out_dir save_dir checkpoint_dir run folder",
    "output": "out out_file",
    "k": "topk top_k n n_items n_recommendations num top num_recommendations",
    "filter_seen": "filter_viewed filter_already_liked_items remove_seen exclude_seen filter_seen_items filter_interacted",
    "histories": "sequences interactions history user_items df events x X",
    "candidates": "items_to_recommend item_ids whitelist selected_items",
    "exclude": "blacklist filter_items items_to_exclude",
    "titles": "item_features item_names metadata",
    "fallback": "on_unsupported_targets cold_users",
    "validation": "val val_data validation_data eval_set",
    "items": "item item_ids",
    "data": "dataset file input path data_path train_file",
    "run": "model model_path checkpoint ckpt folder path",
    "user": "user_id user_ids user_col",
    "user_column": "user_col user_field uid_field",
    "item": "item_id item_col",
    "time": "timestamp datetime time_col",
    "item_column": "item_col item_field iid_field",
    "time_column": "time_col time_field timestamp_column",
    "similar_items": "similar most_similar get_similar_items nearest nearest_items neighbors neighbours item_to_item",
    "attention_maps": "attention attentions attention_weights get_attention",
    "save": "save_pretrained save_model dump to_disk",
    "train": "fit learn",
    "recommend": "predict infer topk predict_topk",
    "evaluate": "test eval score validate",
    "explain": "plot attention visualize visualise",
    "analyse": "analyze report",
    "data fetch": "fetch download",
    "data make": "make generate synthetic",
    "data stats": "stats describe",
    "fetch": "download get",
    "make": "generate synthetic",
    "stats": "describe info",
}


def meant(name: str, own: Iterable[str]) -> list[str]:
    """Which of the names in `own` somebody may mean by `name`: by habit, or by a slip of the fingers."""
    own = list(own)
    habits = [each for each in own if name in HABITS.get(each, "").split()]
    return habits or get_close_matches(name, own, 1, cutoff=0.75)


def refuse_unknown(call: str, given: Iterable[str], own: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> None:
    """Raise TypeError for the first option that a call does not have.

    own: its options. elsewhere: options that belong elsewhere, and where.
    """
    own, elsewhere = list(own), elsewhere or {}
    for name in given:
        if name in own:
            continue
        here, there = meant(name, own), meant(name, elsewhere)
        if name in elsewhere:
            advice = f"it is an option of {elsewhere[name]}"
        elif here:
            advice = f"did you mean {' or '.join(here)}?"
        elif there:
            advice = f"did you mean {there[0]}? It is an option of {elsewhere[there[0]]}"
        else:
            advice = f"its options are {', '.join(own)}"
        raise TypeError(f"{call} has no option {name}: {advice}")


def names_arguments(method: Callable[P, R]) -> Callable[P, R]:
    """The method, which says what an unknown argument is called here."""
    own = [name for name in signature(method).parameters if name != "self"]

    @wraps(method)
    def call(*args: P.args, **given: P.kwargs) -> R:
        refuse_unknown(method.__name__, given, own)
        return method(*args, **given)

    return call
