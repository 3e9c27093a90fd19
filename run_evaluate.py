"""Evaluation: answer test sets, and score the answers beside two baselines.

Every question is answered greedily, once with its images and once blind (with grey images). The run writes to
`output_dir`:

    results.json         all scores with intervals, overall and by question type, and their definitions
    report.html          the scores, and questions with images, true answers and predictions
    examples.png         a contact sheet of such examples
    predictions.jsonl    every answer (predictions_blind.jsonl: the blind ones); an interrupted run resumes from here

    python run_evaluate.py recipes/chess_demo/evaluate.yaml
    python run_evaluate.py recipes/chess_demo/evaluate.yaml --eval_data '{"test": "a.json", "unseen": "b.json"}'
    python run_evaluate.py --model_name_or_path outputs/sft --eval_data a.json --image_folder images --output_dir out
    accelerate launch --num_processes 4 run_evaluate.py recipes/chess_demo/evaluate.yaml --dtype bfloat16

An official benchmark is asked with LLaVA-1.5's prompts and scored by its own rules (docs/benchmarks.md):

    python run_evaluate.py --model_name_or_path outputs/sft --benchmark pope --questions_file output/coco \\
        --image_folder val2014 --output_dir out

With several test sets, predictions and examples.png go to one subdirectory for each. If the checkpoint is a local
directory with a model card (README.md), the scores are added to the card, unless `--update_card false`. `python
run_evaluate.py --help` lists all options.
"""

import logging
import os
import sys

from jnana.evaluation import (
    answer_test_set,
    card_scores,
    find_card,
    load_questions,
    model_fingerprint,
    process_state,
    write_results,
)
from jnana.evaluation.arguments import EvaluationArguments
from jnana.training.cards import EvaluationResult, add_evaluation_results
from jnana.training.loading import load_model
from jnana.training.options.computation_checks import check_quantization
from jnana.training.options.path_checks import check_output_apart, check_output_dir, check_source
from jnana.training.options.recipes import parse_arguments


logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    # 1. Arguments and logging
    (args,) = parse_arguments([EvaluationArguments], argv)
    state = process_state()
    level = logging.INFO if state.is_main_process else logging.WARNING
    logging.basicConfig(stream=sys.stdout, level=level, format="%(message)s", force=True)
    logger.info(f"{state.num_processes} process{'es' if state.num_processes > 1 else ''} on {state.device}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the dataloader workers tokenise in parallel

    # 2. Checks that need no model, and the test sets
    args.check()
    if args.benchmark is None:
        for source in args.test_sets.values():
            check_source("eval_data", source)
    check_source("model_name_or_path", args.model_name_or_path)
    models = {"model_name_or_path": args.model_name_or_path}
    check_output_apart(args.output_dir, models, allowed="evaluate")
    check_output_dir(args.output_dir)
    check_quantization({"quantization": args.quantization or "none", "compute_dtype": args.dtype}, state.device)
    card = find_card(args)
    questions = load_questions(args)

    # 3. Model
    loading = {"trust_remote_code": args.trust_remote_code, "dtype": args.dtype, "quantization": args.quantization}
    if args.attn_implementation is not None:
        loading["attn_implementation"] = args.attn_implementation
    # loaded straight onto its device, because a quantised model cannot be moved afterwards
    model, processor = load_model(args.model_name_or_path, device_map={"": state.device}, **loading)

    # 4. Answers, with images and blind
    results = [answer_test_set(model, processor, args, name, test_set) for name, test_set in questions.items()]

    # 5. Results, also in the checkpoint's model card
    if state.is_main_process:
        write_results(args, results, model_fingerprint(model))
        if card is not None:
            add_evaluation_results(card, [EvaluationResult(**scores) for scores in card_scores(args, results)])
            logger.info(f"Scores added to the model card: {card}")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1:])
