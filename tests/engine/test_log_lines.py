"""The log of a run: no doubled lines, no lines that help nobody, results in words."""

import logging

from flsl_d2.engine.log_lines import start_log
from flsl_d2.errors import InputError


def test_a_second_run_in_a_process_doubles_nothing(tmp_path, capsys):
    for run in ("a", "b", "b"):
        (tmp_path / run).mkdir(exist_ok=True)
        start_log(str(tmp_path / run), 0, ["test_lines"])
    logger = logging.getLogger("test_lines")
    logger.warning("is_fx_tracing will return true for both")
    logger.info("Cannot find the hook 'x', its state_dict is ignored.")
    logger.error("an error", exc_info=InputError("said elsewhere"))
    for part in ("Task: bbox", "AP,AP50", "12.3000,nan"):
        logger.info("copypaste: %s", part)
    logger.info("line")
    for text in (capsys.readouterr().out, (tmp_path / "b" / "log.txt").read_text()):
        lines = [line.partition("test_lines")[2].partition(": ")[2] for line in text.splitlines()]
        assert lines == ["bbox: AP 12.3000, AP50 nan", "line"]
    assert not (tmp_path / "a" / "log.txt").read_text()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
