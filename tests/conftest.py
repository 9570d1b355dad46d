"""Eight simulated devices on the CPU, and the modes that a single test may ask for."""

import collections
import gc
import os

import chex
import jax
import jax.numpy as jnp
import pytest

# What jax keeps of compiled programs is large, and no garbage: looking for some takes long.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

# Before anything touches a device: the number of devices is read once.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile far longer than they run. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11) and "XLA_FLAGS" not in os.environ:
        # Half the time of a compilation. Read once too, and not for the processes that tests start.
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
        jax.devices()
        del os.environ["XLA_FLAGS"]

from attention_jax.functional import plan, xla_cpu  # noqa: E402

# What takes longest, and has a sibling among the tests that always run: `pytest -m slow` runs these
# and the tests that are marked where they stand.
SLOW = (
    *(
        f"test_configs.py::test_the_first_step_runs[{name}"
        for name in (
            *("causal_window", "copy", "grouped_query", "layers", "lengths", "mad", "mqar"),
            *("multi_head", "pmap", "recall", "sharded", "single_head", "text", "window"),
        )
    ),
    *(
        f"test_train_cli.py::test_letters_that_the_screen_lacks_end_no_run[settings{i}"
        for i in (0, 1)
    ),
    "test_train_cli.py::test_the_commands_of_the_original_work[--model multihead",
    "test_experiment.py::test_a_run_stops_where_a_longer_one_first_reaches_the_target[p",
    "test_experiment.py::test_a_run_stops_where_a_longer_one_first_reaches_the_target[sh",
    "test_experiment.py::test_parameters_that_break_unseen_are_not_saved[p",
    "test_experiment.py::test_parameters_that_break_unseen_are_not_saved[sh",
    "test_experiment.py::test_the_baseline_does_not_depend_on_the_launcher",
    *(
        f"test_dot_product.py::test_half_precision_is_no_worse_than_twice_the_naive_error[{name}"
        for name in (
            "bias-float16-blockwise",
            "long-float16-blockwise",
            "causal-bfloat16-blockwise",
        )
    ),
    *(
        f"test_documents.py::test_a_packed_or_padded_document_is_the_document_alone[{kind}]"
        for kind in ("none", "sinusoidal", "alibi", "strided, rotary")
    ),
    *(
        f"test_transformations.py::test_{name}[{case}]"
        for case in ("differential", "sigmoid")
        for name in (
            "pmap_and_shard_map_split_the_batch_and_change_nothing",
            "scan_and_checkpoint_are_the_loop",
            "vmap_over_a_batch_is_the_batch",
            "forward_mode_and_second_order_are_derivatives",
        )
    ),
    "test_reliability.py::test_a_file_that_may_not_grow_ends_the_run_in_a_line",
    "test_statistics.py::test_triangles_of_tiles_agree_with_blocks_of_logits[full",
    "test_generation.py::test_a_row_stays_at_the_first_token_that_ends_it[{}",
    "test_launch.py::test_evaluation_on_other_axes_gives_the_same_numbers[{'data': 4",
    "test_launch.py::test_evaluation_on_other_axes_gives_the_same_numbers[{'model': 4",
    "test_blockwise.py::test_an_input_of_ones_may_be_known_to_the_compiler[blocks",
    "test_blockwise.py::test_an_input_of_ones_may_be_known_to_the_compiler[heads-full",
    "test_blockwise.py::test_products_with_the_hessian_on_every_core[head-full-eager",
    "test_blockwise.py::test_products_with_the_hessian_on_every_core[heads-window-eager",
    "test_blockwise.py::test_tiles_that_are_chosen_agree_with_the_definition[rows, few of them",
    "test_blockwise.py::test_nan_shows_to_those_who_see_it_alone[0",
    "test_train_cli.py::test_a_terminal_that_is_closed_ends_the_run_saved",
    "test_blockwise.py::test_products_with_the_hessian_are_those_of_the_definition[full",
    "test_experiment.py::test_bad_steps_are_skipped_up_to_as_many_as_allowed",
    "test_sweep.py::test_trials_over_devices_are_the_same_trials",
    "test_sweep.py::test_bad_steps_are_skipped_in_each_trial_alone",
    "test_train_cli.py::test_a_sweep_is_a_flag",
    "test_train_cli.py::test_a_reader_that_leaves_is_no_traceback",
    "test_blockwise.py::test_products_with_the_hessian_on_every_core[blocks-causal-eager",
    "test_blockwise.py::test_nan_shows_to_those_who_see_it_alone[40",
    "test_blockwise.py::test_bfloat16_gradients_do_not_grow_with_what_all_keys_share[many",
    "test_checkpoint.py::test_threads_of_the_storage_layer_print_nothing",
    "test_transformations.py::test_pmap_and_shard_map_split_the_batch_and_change_nothing[gated_delta",
    "test_transformations.py::TestVariants::test_every_setting_at_once_blockwise__with_pmap",
    "test_mesh.py::test_devices_send_nothing[equal heads",
    "test_mesh.py::test_vmap_on_a_mesh[queries",
    "test_mesh.py::test_explicit_axes_of_a_model[rotary",
    "test_mesh.py::test_one_axis_of_a_mesh_may_split_two_axes_of_an_array",
    "test_mesh.py::test_explicit_axes_outside_of_jit[dense",
    "test_step.py::test_a_run_with_bad_steps_is_the_run_of_the_sound_ones[p",
    "test_step.py::test_a_run_with_bad_steps_is_the_run_of_the_sound_ones[sh",
    *(
        f"test_docs.py::test_the_programs_run_and_print_what_the_page_shows[{page}.md"
        for page in (
            *("after_training", "bring_your_own", "gated_delta_attention", "laboratory"),
            *("linear_attention", "masks_and_biases", "models", "multi_head_attention"),
            *("parallel", "rules", "tasks", "text", "training"),
        )
    ),
    "test_blockwise.py::test_a_halved_triangle_takes_all_that_tiles_take",
    "test_caches.py::test_blocks_with_a_window_keep_no_more_than_that",
    "test_caches.py::test_rows_of_different_length_share_a_rolling_cache",
    "test_blockwise.py::test_bfloat16_gradients_do_not_grow_with_what_all_keys_share",
    "test_blockwise.py::test_nan_shows_to_those_who_see_it_alone[69",
    "test_caches.py::test_generated_tokens_need_memory_for_the_window_alone",
    "test_caches.py::test_models_with_memories_generate",
    "test_experiment.py::test_a_step_trains_on_all_slices_together",
    "test_gated_delta.py::test_it_is_the_rule_of_qwen_3_next",
    "test_interop_jax_nn.py::test_random_calls_are_those_of_jax",
    "test_mesh.py::test_explicit_axes_while_decoding",
    "test_sweep.py::test_a_trial_that_diverges_stops_alone",
    "test_sweep.py::test_a_trial_that_reached_the_target_stays_as_it_was",
    "test_transformations.py::test_vmap_over_a_batch_is_the_batch",
    "test_docs.py::test_the_programs_run_and_print_what_the_page_shows[nnx.md",
    "test_generation.py::test_a_stream_gives_the_same_tokens_in_parts",
    "test_experiment.py::test_the_result_says_how_much_of_a_small_space_was_seen",
    "test_mesh.py::test_each_device_reads_the_key_head_of_its_queries",
    "test_mesh.py::test_vmap_on_a_mesh",
    "test_sweep.py::test_a_trial_that_diverges_in_evaluation_keeps_finite_parameters",
    "test_transformations.py::test_shard_map_passes_masks_biases_dropout_and_heads",
    "test_watch.py::test_watching_changes_no_number_of_the_run",
    "test_ahead.py::test_a_run_compiles_each_program_once",
    "test_ahead.py::test_what_is_compiled_at_a_lower_level_has_the_same_bits[memorization",
    "test_ahead.py::test_what_a_run_does_not_call_is_not_compiled",
    "test_bfloat16_products.py::test_a_run_learns_as_in_float32",
    "test_heads.py::test_remat_and_layers_that_run_twice_change_no_statistics",
    "test_inspect.py::test_a_page_has_as_many_weights_as_it_holds",
    "test_inspect.py::test_work_that_takes_long_is_named",
    "test_interop_torch.py::test_random_calls_are_those_of_the_loops",
    "test_launch.py::test_a_run_goes_on_with_other_axes",
    "test_reliability.py::test_a_kill_inside_a_save_loses_nothing",
    "test_sweep.py::test_what_changes_shapes_is_a_program_of_its_own",
    "test_text.py::test_a_run_is_inspected_on_a_text_without_its_file[20",
    "test_biases.py::test_minus_infinity_is_a_word_also_where_infinities_are_errors",
    "test_biases.py::test_the_bias_of_some_tokens_has_their_rows[alibi",
    "test_biases.py::test_the_bias_of_some_tokens_has_their_rows[relative",
    "test_caches.py::test_memories_of_rows_of_different_length",
    "test_dropout.py::test_keys_under_vmap_are_keys_one_by_one",
    "test_experiment.py::test_a_long_compilation_is_told_and_a_short_one_is_not",
    "test_experiment.py::test_a_row_has_the_second_at_which_its_epoch_was_done",
    "test_generation.py::test_a_prompt_may_be_traced[long",
    "test_generation.py::test_a_row_stays_at_the_first_token_that_ends_it",
    "test_generation.py::test_of_a_longer_prompt_the_end_counts",
    "test_heads.py::test_statistics_of_one_head_and_of_other_layers",
    "test_heads.py::test_the_gradient_of_a_gate_is_summed_in_float32",
    "test_inspect.py::test_a_checkpoint_that_is_broken_is_no_step",
    "test_inspect.py::test_rows_of_one_token_are_inspected_without_scores",
    "test_interop_flax.py::test_a_shared_dropout_mask_reaches_the_gradients",
    "test_launch.py::test_evaluation_on_other_axes_gives_the_same_numbers",
    "test_layers.py::test_the_last_output_is_that_of_minus_one",
    "test_masks.py::test_a_window_of_documents_in_pieces_is_the_same_in_tiles",
    "test_mesh.py::test_explicit_axes_outside_of_jit",
    "test_models.py::test_a_refused_call_moves_no_position",
    "test_models.py::test_policies_store_less",
    "test_models.py::test_the_last_block_runs_at_the_asked_positions_alone[False",
    "test_nnx.py::test_a_cache_gives_what_the_whole_gives_and_may_be_cleared",
    "test_rules.py::test_a_placed_or_shifted_rule_sees_positions",
    "test_sweep.py::test_a_row_has_the_second_at_which_the_epoch_of_its_program_was_done",
    "test_sweep.py::test_init_from_starts_every_trial_where_the_other_run_ended",
    "test_sweep.py::test_the_best_trial_is_told_by_the_target",
    "test_text.py::test_a_diverged_run_says_so_although_its_model_cannot_write",
    "test_text.py::test_a_text_sees_all_before_it_in_a_run_of_packed_rows",
    "test_text.py::test_bytes_have_labels_and_may_be_no_text",
    "test_text.py::test_minutes_without_room_for_the_warmup_are_refused",
    "test_blockwise.py::test_tiles_that_are_chosen_agree_with_the_definition",
    "test_export.py::test_everything_left_open_with_gradients",
    "test_nnx.py::test_parameters_move_both_ways_with_equal_outputs_and_gradients[model",
    "test_statistics.py::test_what_is_masked_may_hold_anything",
    "test_text.py::test_rows_of_several_lengths_count_by_their_answers",
    "test_text.py::test_a_run_is_inspected_on_a_text_without_its_file",
    "test_text.py::test_a_prompt_is_read_as_the_text_was",
    "test_mesh.py::test_tokens_are_generated_where_their_rows_lie[explicit",
    "test_mesh.py::test_explicit_axes_of_a_layer",
    "test_models.py::test_padding_needs_no_row_of_the_table",
    "test_models.py::test_the_last_block_runs_at_the_asked_positions_alone[True-fields0",
    "test_models.py::test_positions_are_what_tells_orders_apart",
    "test_huggingface.py::test_a_model_whose_heads_do_not_divide_its_width_is_saved",
    "test_ahead.py::test_what_is_compiled_at_a_lower_level_has_the_same_bits[teacher",
    "test_heads.py::test_statistics_and_means_are_those_of_all_tokens",
    "test_heads.py::test_means_of_layers_that_scan_runs_are_over_all_runs",
    "test_heads.py::test_importance_of_rows_with_masks_of_their_own",
    "test_heads.py::test_pairs_hold_each_head_alone_and_with_another",
    "test_train_cli.py::test_what_a_second_signal_cuts_short_is_no_error",
    "test_experiment.py::test_what_a_task_hides_is_hidden_from_the_model",
    "test_experiment.py::test_a_task_that_holds_out_is_evaluated_on_what_it_holds_out",
    "test_dot_product.py::test_empty_row_makes_no_nan_on_the_way[eager-dense",
    "test_generation.py::test_a_prompt_may_be_traced[slides",
    "test_generation.py::test_no_more_tokens_are_made_when_all_rows_have_ended",
    "test_generation.py::test_what_stands_behind_a_prompt_may_be_no_token",
    "test_blockwise.py::test_products_with_the_hessian_are_those_of_the_definition",
    "test_blockwise.py::test_large_tiles_keep_float32_exact",
    "test_blockwise.py::test_one_operand_alone_may_be_mapped",
    "test_statistics.py::test_a_uniform_head_has_the_entropy_of_its_keys",
    "test_dropout.py::test_batch_head_query_and_key_are_independent",
    "test_dropout.py::test_rows_are_independent_with_a_key_of_any_kind",
    "test_biases.py::test_distances_are_those_of_positions",
    "test_biases.py::test_the_bias_of_some_tokens_has_their_rows[placed",
)


# How many cases of a test always run, evenly taken from all; of other tests half of them do.
# `pytest -m slow` runs the rest.
CASES = {
    "test_biases.py::test_alibi_slopes_are_those_of_the_paper": 2,
    "test_biases.py::test_distances_are_those_of_positions": 1,
    "test_blockwise.py::test_a_cap_and_a_scale_are_divided_as_they_are": 1,
    "test_blockwise.py::test_a_logit_of_minus_infinity_has_no_weight_in_the_gradients": 2,
    "test_blockwise.py::test_a_sink_takes_its_share_beside_logits_of_any_size": 3,
    "test_blockwise.py::test_an_input_of_ones_may_be_known_to_the_compiler": 2,
    "test_blockwise.py::test_gradients_of_a_gradient_are_those_of_the_definition": 1,
    "test_blockwise.py::test_memory_is_linear_in_the_sequence": 1,
    "test_blockwise.py::test_off_the_cpu_tiles_are_plain": 1,
    "test_blockwise.py::test_one_operand_alone_may_be_mapped": 1,
    "test_blockwise.py::test_products_with_the_hessian_are_those_of_the_definition": 1,
    "test_blockwise.py::test_products_with_the_hessian_on_every_core": 1,
    "test_blockwise.py::test_random_draws_agree_with_the_loops": 2,
    "test_blockwise.py::test_rows_whose_logits_need_a_peak_are_right_and_change_no_other": 1,
    "test_blockwise.py::test_second_derivatives_with_and_without_a_peak": 1,
    "test_blockwise.py::test_tiles_that_are_chosen_agree_with_the_definition": 1,
    "test_caches.py::test_a_rolling_cache_in_any_portions_is_the_full_forward_pass": 1,
    "test_check.py::test_what_is_right_is_said_to_be": 1,
    "test_checkpoint.py::test_broken_newest_gives_way_to_the_one_before": 6,
    "test_checkpoint.py::test_resumed_run_ends_like_the_uninterrupted_one": 1,
    "test_configs.py::test_the_first_step_can_be_traced": 2,
    "test_documents.py::test_a_packed_or_padded_document_is_the_document_alone": 1,
    "test_documents.py::test_a_token_stands_where_it_is_said_to": 2,
    "test_documents.py::test_padded_prompts_and_gaps_decode_as_the_full_forward_pass": 2,
    "test_documents.py::test_positions_that_are_given_are_those_that_are_derived": 2,
    "test_dot_product.py::test_empty_row_is_exact_zero_with_exact_zero_gradients": 3,
    "test_dot_product.py::test_empty_row_makes_no_nan_on_the_way": 1,
    "test_dot_product.py::test_float32_matches_the_definition": 6,
    "test_dot_product.py::test_float64_stays_float64": 2,
    "test_dot_product.py::test_half_precision_is_no_worse_than_twice_the_naive_error": 2,
    "test_dot_product.py::test_the_residual_of_a_row_that_sees_its_sink_alone_is_the_sink": 1,
    "test_dot_product.py::test_what_is_masked_may_hold_anything": 2,
    "test_dropout.py::test_batch_head_query_and_key_are_independent": 1,
    "test_dropout.py::test_keys_under_vmap_are_keys_one_by_one": 1,
    "test_dropout.py::test_outputs_and_gradients_with_dropout_match_the_definition": 1,
    "test_dropout.py::test_rows_are_independent_with_a_key_of_any_kind": 1,
    "test_dropout.py::test_the_mean_over_many_keys_is_the_output_without_dropout": 1,
    "test_dropout.py::test_the_place_does_not_depend_on_the_batch_axes_being_one_or_two": 1,
    "test_dropout.py::test_the_rate_is_the_share_of_weights_that_are_dropped": 1,
    "test_experiment.py::test_a_crashed_run_ends_like_an_uninterrupted_one": 1,
    "test_export.py::test_a_batch_left_open_for_every_mechanism": 1,
    "test_export.py::test_everything_left_open_with_gradients": 1,
    "test_export.py::test_lengths_left_open": 1,
    "test_heads.py::test_a_pruned_model_is_the_model_with_closed_gates": 3,
    "test_huggingface.py::test_logits_are_those_of_transformers": 3,
    "test_huggingface.py::test_rotations_beyond_the_trained_length_are_those_of_transformers": 1,
    "test_huggingface.py::test_transformers_loads_what_was_saved": 3,
    "test_huggingface.py::test_what_is_saved_are_the_tensors_that_were_loaded": 3,
    "test_launch.py::test_a_run_traces_its_programs_once": 1,
    "test_launch.py::test_launchers_agree_after_fifty_steps": 1,
    "test_linear.py::test_causal_in_chunks_is_the_sum_over_the_past": 2,
    "test_masks.py::test_what_a_pattern_says_of_a_block_of_queries_is_so": 2,
    "test_mechanisms.py::test_each_type_is_as_exact_as_it_can_be": 3,
    "test_mechanisms.py::test_empty_sizes_are_legal": 5,
    "test_mechanisms.py::test_values_and_gradients_are_the_oracles": 6,
    "test_mesh.py::test_devices_send_nothing": 1,
    "test_models.py::test_every_choice_learns_and_sees_what_it_may": 3,
    "test_modes.py::test_64_bits_change_neither_numbers_nor_types": 1,
    "test_modes.py::test_what_forbids_promotion_forbids_nothing_here": 13,
    "test_rules.py::test_a_mask_says_what_its_function_says_of_each_pair": 3,
    "test_statistics.py::test_gradients_are_those_of_the_weights": 2,
    "test_statistics.py::test_they_are_those_of_the_weights": 3,
    "test_tasks.py::test_labels_follow_from_the_tokens_by_the_rule": 6,
    "test_tasks.py::test_row_depends_on_its_number_and_the_key_alone": 5,
    "test_tasks.py::test_task_says_what_it_makes": 5,
    "test_transformations.py::test_forward_mode_and_second_order_are_derivatives": 2,
    "test_transformations.py::test_pmap_and_shard_map_split_the_batch_and_change_nothing": 1,
    "test_transformations.py::test_scan_and_checkpoint_are_the_loop": 1,
}


@pytest.hookimpl(tryfirst=True)  # Before `-m` looks at the marks.
def pytest_collection_modifyitems(items):
    cases = collections.defaultdict(list)
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        elif not item.get_closest_marker("slow"):
            cases[name.split("[")[0]].append(item)
    for name, found in cases.items():
        number = CASES.get(name, (len(found) + 1) // 2)
        always = {found[i * len(found) // number] for i in range(number)}
        for item in found:
            if item not in always:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def bfloat16_instructions(monkeypatch):
    """Every machine takes the path of processors that multiply bfloat16, which has more steps.

    Returns a function that says whether the processor has such instructions.
    """

    def have(value):
        for module in (plan, xla_cpu):
            monkeypatch.setattr(module, "multiplies_bfloat16", lambda: value)

    have(True)
    return have


@pytest.fixture
def x64():
    """float64 is a type of its own for the length of one test, not float32 under another name."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def debug_nans():
    """Every NaN that any operation makes is an error, also one that is thrown away later."""
    with jax.debug_nans(True):
        yield


@pytest.fixture
def debug_infs():
    """The same for infinities."""
    with jax.debug_infs(True):
        yield


@pytest.fixture
def hollow(monkeypatch):
    """Makes the loss of the teacher NaN at each step whose batch holds a number above 3.

    Returns a function from a config to a list that says of each step whether it is such a one.
    """
    from attention_jax.training import build

    squared_error = build.steps.LOSSES["squared_error"]

    def hollow_squared_error(apply):
        loss_fn = squared_error(apply)

        def loss(params, batch, rng):
            total, sums = loss_fn(params, batch, rng)
            bad = (rng is not None) & (batch.inputs.max() > 3)  # Not in evaluation.
            return jnp.where(bad, jnp.nan, total), sums

        return loss

    def bad_steps(config):
        task, train = build.make_task(config), config.train
        rng = jax.random.fold_in(jax.random.key(config.seed), build._TRAIN)
        rows = jnp.arange(train.batch_size)
        inputs = lambda step: task.sample(jax.random.fold_in(rng, step), rows).inputs
        numbers = jnp.arange(train.epochs * train.steps_per_epoch)
        return jax.jit(jax.vmap(lambda step: inputs(step).max() > 3))(numbers).tolist()

    monkeypatch.setitem(build.steps.LOSSES, "squared_error", hollow_squared_error)
    return bad_steps


@pytest.fixture
def max_traces():
    """`chex.assert_max_traces`, which would go on counting where an earlier test stopped."""
    chex.clear_trace_counter()
    return chex.assert_max_traces


@pytest.fixture
def at_step(monkeypatch):
    """Does something right after the row of a step is written."""
    from attention_jax.training import experiment

    def arrange(step, action):
        write = experiment.RunDirectory.write

        def writing(self, row):
            write(self, row)
            if row["step"] == step:
                action()

        monkeypatch.setattr(experiment.RunDirectory, "write", writing)
        return monkeypatch.undo

    return arrange
