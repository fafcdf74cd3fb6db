"""The standard tests that LangChain has for chat models, over a service of ours: an adapter is the other model they ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest

from shoal import Model
from tests.extra import package
from tests.flows.conftest import KEY, running

INI = """[pytest]
asyncio_mode = auto
asyncio_default_test_loop_scope = session
asyncio_default_fixture_loop_scope = session
"""
PASS = 40  # and more; the others are skipped or listed, each with its reason


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_langchains_own_suite_passes_but_for_what_is_listed(tmp_path: Path) -> None:
    package("langchain_tests")
    (tmp_path / "pytest.ini").write_text(INI)
    with running(Model.from_preset("tiny", seed=3), max_queue=16, max_batch=8) as service:
        body = {"lora_name": "carp", "lora_path": "one"}
        httpx.post(f"{service.url}/v1/load_lora_adapter", json=body, headers=service.headers).raise_for_status()
        (quote,) = service.model.tokenizer.encode('"')
        root = Path(__file__).parents[2]
        told = {"SHOAL_TEST_URL": service.url, "SHOAL_TEST_KEY": KEY, "SHOAL_TEST_QUOTE": str(quote)}
        words = [sys.executable, "-m", "pytest", "-c", str(tmp_path / "pytest.ini"), "-q", "-p", "no:cacheprovider"]
        words += ["--rootdir", str(tmp_path), f"--junitxml={tmp_path / 'told.xml'}", "--tb=short"]
        done = subprocess.run(
            [*words, str(root / "tests" / "flows" / "langchain_standard.py")],
            capture_output=True, text=True, timeout=550, env=os.environ | told, cwd=root,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cases = [*ElementTree.parse(tmp_path / "told.xml").getroot().iter("testcase")]
    assert sum(case.find("skipped") is None for case in cases) >= PASS, [case.get("name") for case in cases]
