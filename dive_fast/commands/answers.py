"""Writes the candidate answers of visual questions to a file: the most frequent ones of training questions.

``dive-fast answers questions.json --count 1000 --output answers.json`` reads questions in VQAv2's form, and their
answers from the file with VQAv2's name next to them, or from ``--annotations``. Sets of ``evaluate.sets`` with
``task = vqa`` name the file as ``answers``. See docs/vqa.md.
"""

import argparse
import json
from pathlib import Path

from dive_fast.commands import cli


@cli.guarded
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; a user's mistake becomes one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", help="JSON file of the training questions")
    parser.add_argument("--annotations", metavar="FILE", help="JSON file of their answers; default: VQAv2's name")
    parser.add_argument(
        "--count", type=cli.count(2), default=1000, help="number of answers at most; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file")
    options = parser.parse_args(arguments)

    from dive_fast.data.sources.vqa_json import frequent_answers, read_answers, read_questions
    from dive_fast.errors import DataError, UserError
    from dive_fast.evaluation.early_checks import check_output
    from dive_fast.io.atomic_files import write_atomic

    try:
        check_output(options.output.parent)
        read = read_questions(options.questions, options.annotations, None, images=False)
        answers = frequent_answers(read.usable, options.count)
        listed = answers.candidates.answers
        if len(listed) < 2:
            raise DataError(f"{options.questions}: {len(listed)} answers; ranking needs at least 2")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(
            options.output, (json.dumps(answers.candidates._asdict(), ensure_ascii=False) + "\n").encode()
        )
        assert read_answers(str(options.output)) == answers.candidates
    except UserError as error:
        return cli.report_error(error, options)
    total, skipped = len(read.usable), len(read.skipped)
    print(
        f"{options.output}: {len(listed):,} of {answers.num_distinct:,} answers, the most frequent "
        f"ones of {answers.num_covered:,} of {total:,} questions ({100 * answers.num_covered / total:.1f} %); "
        f"{len(answers.candidates.openings):,} openings of questions limit them"
    )
    if skipped:
        print(f"{skipped:,} questions were left out: {read.skipped[0].reason} (the first: {read.skipped[0].key})")
    return 0
