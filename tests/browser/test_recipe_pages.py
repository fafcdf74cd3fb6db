"""The pages of the recipes in Debian's chromium: tools that the shop executes, a notice and a red flag, questions on a licence.

What the model says is given, since a random one says nothing; what the shop gives and the server adds is real.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import httpx
import pytest

from recipes.customer_service.customers import EXAMPLES
from recipes.customer_service.service import serving
from recipes.customer_service.shop import TOOLS
from recipes.law.words import SYSTEM
from recipes.medicine import rules
from recipes.medicine.words import SYSTEM as ASSESSES
from recipes.named import named
from shoal import Model, presets
from shoal.data.chats import forms
from shoal.inputs.chat import encode_chat
from shoal.inputs.tools import call
from shoal.model.net import Net
from tests.browser.driving import ask, kept, most_tokens, open_settings, told, visit
from tests.browser.site import site
from tests.browser.test_access import in_both_schemes
from ui.assistants import ASSISTANTS

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.drill]


def answered(page: Page, text: str, count: int) -> None:
    ask(page, text)
    page.locator(".facts").nth(count - 1).wait_for()
    page.get_by_label("Submit").wait_for()


def roomy() -> Model:
    """A random model with room for a list of tools."""
    config = dataclasses.replace(presets.get("test").model, train_length=4096)
    return Model(config, Net(config).init_(3), Model.from_preset("test", seed=3).tokenizer, name="fish")


def test_the_shop_executes_what_the_model_calls_and_the_page_shows_call_and_result(
    page: Page, strangers: list[str]
) -> None:
    with serving() as shop, site(tools=shop, model=roomy()) as here:
        system = httpx.get(f"{shop}/system").json()["system"]
        order = system.split("Orders: ")[1].split()[0]
        visit(page, here, "customer-service")
        most_tokens(page, 16)
        with here.saying(call("track_order", {"order": order}), "It comes <b>soon</b>. Shall I look up the route?"):
            answered(page, "When does my order arrive?", 1)
        shown = page.locator(".lookup")
        assert shown.locator(".call").inner_text() == f'track_order {{"order": "{order}"}}'
        given = json.loads(shown.locator(".given").inner_text())
        assert given["status"] == "on the way" and given["day"]
        page.get_by_text("It comes <b>soon</b>. Shall I look up the route?").wait_for()
        assert order in told(here) and "track_order" in told(here) and given["day"] in told(here)
        assert in_both_schemes(page) == []
        with here.saying(
            call("track_order", {"order": order, "route": True}),
            call("find_product", {"product": "moon"}),
            "It passed two cities.",
        ):
            answered(page, "Yes, please.", 2)
        assert shown.nth(1).locator(".call").count() == 2 and shown.count() == 2
        assert json.loads(shown.nth(1).locator(".given").first.inner_text())["next"]
        assert "error" in json.loads(shown.nth(1).locator(".given").last.inner_text())
        assert given["day"] in told(here), "what was looked up before is still known"
        kept(page, "It passed two cities.")
        page.reload()
        page.get_by_text("It passed two cities.").wait_for()
        assert page.locator(".lookup .call").count() == 3, "a conversation that was kept has its calls"
        page.goto("about:blank")


def test_a_model_that_calls_for_ever_is_stopped(page: Page, strangers: list[str]) -> None:
    with serving() as shop, site(tools=shop, model=roomy()) as here:
        visit(page, here, "customer-service")
        most_tokens(page, 16)
        with here.saying(call("find_product", {"product": "drone"})):
            ask(page, "Do you have a drone?")
            page.get_by_text("The model called a tool 5 times, and was stopped.").wait_for()
        page.goto("about:blank")


def test_medicine_has_the_servers_notice_and_its_red_flag_before_what_the_model_says(
    page: Page, strangers: list[str]
) -> None:
    with site(policy=rules.policy()) as here:
        visit(page, here, "medicine")
        assert page.get_by_role("note").is_visible()
        most_tokens(page, 16)
        with here.saying("Possible causes: influenza. Urgency: self-care."):
            answered(page, "I have a fever and a crushing pain in my chest.", 1)
        first = page.locator(".bot").first.inner_text()
        places = [first.index(words) for words in (rules.NOTICE["en"], "Red flag (", "Possible causes")]
        assert places == sorted(places) and "treat this as an emergency" in first
        assert in_both_schemes(page) == []
        with here.saying("Possible causes: common cold. Urgency: self-care."):
            answered(page, "And a runny nose?", 2)
        assert rules.NOTICE["en"] in page.locator(".bot").last.inner_text()
        assert rules.NOTICE["en"] not in told(here), "a model does not read its own notices"
        page.goto("about:blank")


def test_a_page_says_what_its_model_was_taught_and_offers_the_recipe_s_examples(
    page: Page, strangers: list[str]
) -> None:
    """And leaves depth to the policy, until somebody picks one or writes another system prompt."""
    medicine = next(one for one in ASSISTANTS if one.place.path == "medicine")
    with site(policy=rules.policy()) as here:
        visit(page, here, "medicine")
        open_settings(page)
        page.wait_for_function(
            "words => [...document.querySelectorAll('textarea')].some(one => one.value === words)", arg=ASSESSES
        )
        most_tokens(page, 16)
        with here.saying("Urgency: today."):
            page.locator("#chat").get_by_text(rules.EXAMPLES[0]).click()
            page.locator(".facts").wait_for()
        assert ASSESSES in told(here) and medicine.system not in told(here) and rules.EXAMPLES[0] in told(here)
        assert here.client.requests[-1].depth == "full"
        page.get_by_label("System prompt").fill("You are a poet.")
        page.locator("#depth").get_by_text("shallow").click()
        with here.saying("A rose."):
            answered(page, "And now?", 2)
        assert "You are a poet." in told(here) and here.client.requests[-1].depth == "shallow"
        visit(page, here, "law")
        page.locator("#chat").get_by_text("May I sell it?").wait_for()
        page.goto("about:blank")


@pytest.mark.parametrize(
    ("name", "text"),
    [("customer-service", EXAMPLES["en"]), ("customer-service", EXAMPLES["zh"]), ("code", "x"), ("law", "y")],
)
def test_what_a_page_asks_is_token_for_token_what_the_recipe_taught(
    page: Page, strangers: list[str], name: str, text: str
) -> None:
    with serving() as shop, site(policy=named(name).policy(), tools=shop, model=roomy()) as here:
        signed_in = httpx.get(f"{shop}/system").json()["systems"]["zh" if text == EXAMPLES["zh"] else "en"]
        visit(page, here, name)
        most_tokens(page, 16)
        with here.saying("Well."):
            answered(page, text, 1)
        made = named(name).policy().page
        assert made is not None
        system = signed_in if name == "customer-service" else made.system
        turns = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]
        row = {"messages": turns, "tools": TOOLS if name == "customer-service" else []}
        model = here.client.model
        taught = encode_chat(
            forms.canonical(row)["messages"], model.tokenizer, model.config, template=model.chat_template, answers=False
        )
        assert told(here) == model.tokenizer.decode(taught.ids)
        page.goto("about:blank")


def test_law_has_a_notice_of_its_own_and_tells_the_model_what_the_recipe_does(page: Page, strangers: list[str]) -> None:
    law = next(one for one in ASSISTANTS if one.place.path == "law")
    assert law.system == SYSTEM
    with site(model=roomy()) as here:
        visit(page, here, "law")
        assert page.get_by_role("note").inner_text().startswith("This is no legal advice.")
        most_tokens(page, 16)
        clause = law.examples["Is there a warranty?"]["text"].split("\n")[0]
        with here.saying(f"Not permitted: {clause}"):
            page.locator("#chat").get_by_text("Is there a warranty?").click()
            page.locator(".facts").wait_for()
        page.get_by_text(f"Not permitted: {clause}").wait_for()
        assert SYSTEM in told(here) and told(here).count(clause) == 1
        assert page.get_by_role("note").is_visible()
        page.goto("about:blank")
