"""Classifies each Megatron-LM argument: carried, fixed, without effect, or refused by name.

A checkpoint holds every argument of the run that wrote it, hundreds of them, and an unknown
argument may change what the model computes.  The lists cover the arguments of Megatron-LM and the
fields of Megatron-Core's TransformerConfig, 0.4 to 0.19.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megagrow.checkpoint.interface.accounting import names_in
from megagrow.checkpoint.interface.format import LeftOut
from megagrow.errors import CheckpointError

# Read or compared by `names` and `source`.
CARRIED = names_in(
    "add_bias_linear add_position_embedding attention_dropout bias_gelu_fusion "
    "consumed_train_samples encoder_num_layers "
    "ffn_hidden_size group_query_attention hidden_dropout hidden_size init_method_std iteration "
    "kv_channels layernorm_epsilon max_position_embeddings norm_epsilon normalization "
    "num_attention_heads num_layers num_query_groups padded_vocab_size "
    "pipeline_model_parallel_size position_embedding_type rotary_base swiglu "
    "tensor_model_parallel_size untie_embeddings_and_output_weights use_distributed_optimizer "
    "use_rotary_position_embeddings vocab_size"
)
# Arguments that change the function of the same tensors, with the values that match ours; an
# absent argument counts as the first.
FIXED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        names_in(
            "multi_latent_attention squared_relu quick_geglu gated_linear_unit apply_layernorm_1p "
            "layernorm_zero_centered_gamma apply_residual_connection_post_layernorm qk_layernorm "
            "qk_l2_norm add_qkv_bias attention_output_gate rotary_interleaved use_rope_scaling "
            "is_hybrid_model heterogeneous_block_specs use_kitchen use_kitchen_attention "
            "fp8_param fp4_param retro_add_retriever standalone_embedding_stage "
            "use_te_activation_func"
        ),
        (False, None),
    ),
    **dict.fromkeys(
        names_in(
            "num_experts num_moe_experts activation_func softmax_scale window_attn_skip_freq "
            "activation_func_clamp_value no_rope_freq mrope_section experimental_attention_variant "
            "linear_attention_freq linear_attention_type hybrid_override_pattern "
            "hybrid_layer_pattern mtp_hybrid_override_pattern heterogeneous_layers_config_path "
            "heterogeneous_layers_config_encoded_json kitchen_config_file kitchen_recipe_number "
            "quant_recipe te_precision_config_file spec yaml_cfg pipeline_model_parallel_layout "
            "pipeline_model_parallel_split_rank decoder_num_layers "
            "num_layers_per_virtual_pipeline_stage"
        ),
        (None,),
    ),
    **dict.fromkeys(
        names_in(
            "virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank "
            "rotary_seq_len_interpolation_factor expert_model_parallel_size"
        ),
        (None, 1),
    ),
    **dict.fromkeys(
        names_in(
            "mtp_num_layers encoder_tensor_model_parallel_size "
            "encoder_pipeline_model_parallel_size hybrid_attention_ratio hybrid_mlp_ratio "
            "glu_linear_offset"
        ),
        (None, 0),
    ),
    "window_size": (None, (-1, -1), (-1, 0)),  # all preceding tokens
    "softmax_type": ("vanilla",),
    "rope_type": (None, "rope"),
    "rotary_percent": (1.0,),
}
# How a run was trained, monitored, laid out and saved; and arguments of features that the list
# above requires to be off.
_WITHOUT_EFFECT = names_in(
    "DDP_impl _cpu_offloading_context _is_global_batch_size_explicitly_specified "
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split "
    "accumulate_allreduce_grads_in_fp32 activation_func_fp8_input_store "
    "activations_checkpoint_method activations_checkpoint_num_layers align_grad_reduce "
    "align_param_gather allow_ambiguous_pad_tokens apply_query_key_layer_scaling "
    "apply_rope_fusion apply_wd_to_qk_layernorm attention_backend attention_softmax_in_fp32 "
    "auto_detect_ckpt_format autocast_dtype barrier_with_L1_time batch_invariant_mode "
    "batch_p2p_comm batch_p2p_sync batch_size bf16 bias_activation_fusion bias_dropout_fusion "
    "bias_swiglu_fusion block_data_path cache_mla_latents calc_ft_timeouts "
    "calculate_per_token_loss check_for_large_grads check_for_nan_in_loss_and_grad "
    "check_for_spiky_loss check_weight_hash_across_dp_replicas_interval classes_fraction "
    "clip_grad clone_scatter_output_in_embedding config_logger_dir consumed_train_bins "
    "consumed_valid_samples context_parallel_size cp_comm_type create_all_gather_group "
    "create_attention_mask_in_dataloader deallocate_pipeline_outputs decode_only_cuda_graphs "
    "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_seq_length "
    "decoupled_lr decoupled_min_lr decrease_batch_size_if_needed defer_embedding_wgrad_compute "
    "delay_grad_reduce delay_param_gather delay_wgrad_compute deprecated_use_mcore_models "
    "deterministic_mode disable_bf16_reduced_precision_matmul disable_chunked_prefill "
    "disable_jit_fuser disable_mamba_mem_eff_path disable_msc_deprecated "
    "disable_parameter_transpose_cache disable_straggler_on_startup "
    "disable_symmetric_registration distribute_checkpointed_activations "
    "distribute_saved_activations distributed_backend distributed_timeout_minutes "
    "distributed_timeout_seconds_after_init dump_param_to_param_group_map embedding_init_method "
    "embedding_init_method_std embedding_path empty_unused_memory_level enable_autocast "
    "enable_chunked_prefill enable_cuda_graph enable_cuda_graphs enable_experimental "
    "enable_ft_package enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc "
    "enable_one_logger encoder_seq_length end_weight_decay eod_mask_loss "
    "ep_overlap_early_attn_memory_release error_injection_rate error_injection_type "
    "evidence_data_path exp_avg_dtype exp_avg_sq_dtype expert_tensor_parallel_size "
    "external_cuda_graph faiss_use_gpu fake_process_group finalize_model_grads_func "
    "fine_grained_activation_offloading finetune first_last_layers_bf16 flash_decode fp16 "
    "fp16_lm_cross_entropy fp32_allreduce fp32_residual_connection fp4 fp8 freeze_all_layers "
    "full_validation fused_single_qkv_rope global_batch_size grad_reduce_in_bf16 grad_scale_func "
    "grad_sync_func gradient_accumulation_fusion gradient_reduce_div_fusion head_lr_mult "
    "hetereogenous_dist_checkpoint hierarchical_context_parallel_sizes "
    "high_priority_stream_groups hybrid_context_parallel hysteresis img_dim img_h img_w "
    "init_method init_method_xavier_uniform init_model_with_meta_device initial_loss_scale "
    "iter_per_epoch iterations_to_skip kitchen_attention_backend kv_lora_rank lazy_mpu_init "
    "legacy_tokenizer linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads "
    "linear_num_value_heads linear_value_head_dim load local_rank lr main_grads_dtype "
    "main_params_dtype make_vocab_size_divisible_by mask_factor mask_prob mask_type "
    "masked_softmax_fusion max_seqlen_per_dp_cp_rank max_tokens_to_oom "
    "memory_efficient_layer_norm memory_snapshot_path merge_file micro_batch_size "
    "microbatch_group_size_per_vp_stage mid_level_dataset_surplus min_loss_scale min_lr "
    "min_offloaded_tensor_size mla_down_proj_fusion mlp_chunks_for_prefill mmap_bin_files "
    "mmap_warmup mock_data model_parallel_size model_type mscale mscale_all_dim "
    "mtp_loss_scaling_factor mtp_standalone multiple_validation_sets no_persist_layer_norm "
    "no_sync_func no_weight_decay_cond_type num_channels num_classes num_dataset_builder_threads "
    "num_distributed_optimizer_instances num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
    "num_microbatches_with_partial_activation_checkpoints num_speculative_tokens num_workers "
    "object_storage_cache_path offset_sampling_seed_by_dp_rank onnx_safe openai_gelu optimizer "
    "outer_dp_sharding_strategy output_bert_embeddings output_layer_init_method param_sync_func "
    "params_dtype patch_dim per_dataset_sequences_path per_split_data_args_path "
    "perform_initialization perform_rl_step persist_layer_norm phase_transition_iterations "
    "pin_cpu_grads pin_cpu_params pipeline_dtype pipeline_model_parallel_comm_backend "
    "pretrained_checkpoint q_lora_rank qk_clip qk_clip_alpha qk_clip_threshold qk_head_dim "
    "qk_pos_emb_head_dim query_in_block_prob rampup_batch_size rank record_memory_history "
    "refit_method relative_attention_max_distance relative_attention_num_buckets "
    "renormalize_blend_weights replication replication_factor replication_jump "
    "report_topk_accuracies reset_attention_mask reset_position_ids "
    "result_rejected_tracker_filename reuse_grad_buf_for_mxfp8_param_ag rope_scaling_factor "
    "rotary_scaling_factor run_workload_inspector_server s3_cache_path sample_rate "
    "scaled_masked_softmax_fusion scaled_upper_triang_masked_softmax_fusion "
    "scatter_gather_tensors_in_pipeline seed seq_length sequence_parallel sft "
    "sft_tokenizer_prompt_format sharp_enabled_group short_seq_prob skip_train "
    "skipped_train_samples split start_weight_decay stream_ckpt_dequant strict_fsdp_dtensor_load "
    "suggested_communication_unit_size symmetric_ar_type te_rng_tracker test_mode timers "
    "titles_data_path torch_fsdp2_reshard_after_forward tp_only_amax_red transformer_impl "
    "transformer_pipeline_model_parallel_size trust_remote_code use_checkpoint_args "
    "use_checkpoint_lr_scheduler use_checkpoint_opt_param_scheduler use_contiguous_buffers_in_ddp "
    "use_contiguous_buffers_in_local_ddp use_cpu_initialization use_custom_fsdp use_dino "
    "use_dist_ckpt use_dist_ckpt_deprecated use_flash_attn use_fused_weighted_squared_relu "
    "use_gloo_process_groups use_inference_optimized_layers use_layer_wise_distributed_optimizer "
    "use_layer_wise_param_layout use_legacy_models use_legacy_static_engine "
    "use_mamba_mem_eff_path use_mcore_models use_megatron_fsdp use_mp_args_from_checkpoint_args "
    "use_one_sent_docs use_persistent_ckpt_worker use_precision_aware_optimizer "
    "use_pytorch_profiler use_ring_exchange_p2p use_sharp use_te_rng_tracker "
    "use_tokenizer_model_from_checkpoint_args use_torch_fsdp2 use_torch_optimizer_for_cpu_offload "
    "use_tp_pp_dp_mapping v_head_dim variable_seq_lengths vocab_extra_ids vocab_file warmup "
    "weight_decay weight_decay_incr_style wgrad_deferral_limit world_size"
)
_FAMILIES = tuple(
    names_in(
        "adam_ adlr_ app_tag_ async_ bert_ biencoder_ checkpoint_ ckpt_ cpu_offloading "
        "cross_entropy_ cuda_graph_ data_ dataloader_ ddp_ dino_ dist_ckpt_ distrib_optim_ dsa_ "
        "eval_ exit_ fim_ fp4_ fp8_ fsdp_ ft_ grpo_ ict_ indexer_ inference_ inprocess_ keep_fp8_ "
        "langrl_ lion_ load_ log_ logging_ logits_ loss_scale lr_ mamba_ manual_gc megatron_fsdp_ "
        "moe_ muon_ nccl_ no_load_ no_save_ non_persistent_ offload_ one_logger_ optimizer_ "
        "overlap_ override_ profile recompute_ rerun_ retriever_ retro_ rl_ save sgd_ straggler_ "
        "swin_ tensorboard_ tiktoken_ timing_ tokenizer_ tp_comm_ train_ valid_ vision_ wandb_ "
        "yarn_ test_data"
    )
)
_TRAINING = "a training argument, which does not affect what the model computes"


def require_known(
    args: Mapping[str, Any], *, where: str, ignore: Collection[str] = ()
) -> Iterator[LeftOut]:
    """The arguments that are left out, after checking that each is known.

    Args:
        ignore: names of arguments that the user declares harmless.

    Raises:
        CheckpointError: names an argument that our model cannot express, or whose effect is
            unknown.
    """
    for key, value in args.items():
        name = f"args.{str(key)[:200]}"
        if key in ignore:
            yield LeftOut(name, "ignored, as you asked")
        elif key in FIXED:
            if not any(value == known for known in FIXED[key]):
                raise CheckpointError(
                    f"{where}: {name}: megagrow's model has no such feature",
                    found=repr(value)[:200],
                    expected=repr(FIXED[key][0]),
                )
        elif key in _WITHOUT_EFFECT or str(key).startswith(_FAMILIES):
            yield LeftOut(name, _TRAINING)
        elif key not in CARRIED:
            if value is None or value is False or value in ("", (), [], {}):
                yield LeftOut(name, "not set")
                continue
            raise CheckpointError(
                f"{where}: {name}: not an argument that megagrow knows",
                found=repr(value)[:200],
                fix="if it does not affect what the model computes: launch/convert.py "
                f"--ignore {key} (in a run: init.ignore)",
            )
