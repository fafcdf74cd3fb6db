"""The chat page as a Gradio app: the conversation on the left, the settings of the next answer on the right."""

from __future__ import annotations

import html
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import openai

from ui import talk
from ui.talk import Card, Settings

HERE = Path(__file__).parent
CSS, ICON = HERE / "style.css", HERE / "icon.svg"
IMAGES = (".png", ".jpg", ".jpeg", ".webp")  # what the API decodes
MAX_FILE_SIZE = "8mb"  # the API's own limit for an image
AT_ONCE = 64  # answers that stream at once; the engine's queue bounds them further
MOST_TOKENS = 128  # of an answer, unless the slider says more
AUTO = ("auto, by the question", "auto")
LARGER = "def larger(a, b):"
EXAMPLES: dict[str, dict[str, Any]] = {  # what the page is for -> a first message, as the demo corpus puts it
    "Customer service": {"text": "Where is my kettle?"},
    "Code": {"text": f"Write this function: Return the larger of two numbers.\n{LARGER}"},
    "Image question": {"text": "what color is the shape?", "files": [str(HERE / "shape.png")]},
    "Summary": {"text": f"Summarise this function:\n{LARGER}\n    return a if a > b else b"},
}
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")

THEME = gr.themes.Base(
    primary_hue="cyan", secondary_hue="cyan", neutral_hue="slate", radius_size="md", font=FONTS, font_mono=MONO
).set(
    body_background_fill="#f6f9fa",
    body_text_color_subdued="*neutral_500",  # a step darker than Gradio's: WCAG AA on white
    block_info_text_color="*neutral_500",
    input_placeholder_color="*neutral_500",
    block_border_width="0px",
    block_shadow="none",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_text_color="white",
    checkbox_label_background_fill="transparent",
    checkbox_label_background_fill_hover="*primary_50",
    checkbox_label_background_fill_selected="*primary_50",
)


def build(base_url: str, model: str | None = None) -> gr.Blocks:
    """The page over the API at `base_url` (which ends in /v1) and its model `model` (None: the server's first)."""
    api = talk.client(base_url)

    async def describe(key: str) -> tuple[Any, ...]:
        """What the page shows of the model, read when the page opens and when a key is given."""
        try:
            card = await talk.read_card(with_key(key), model)
        except openai.OpenAIError as error:
            needs_key = isinstance(error, openai.AuthenticationError)
            return header(talk.reason(error)), gr.skip(), gr.skip(), gr.update(visible=needs_key or bool(key))
        depths = [AUTO, *((f"{name}, {layers} of {card.layers} layers", name) for name, layers in card.depths.items())]
        most = gr.update(maximum=card.context - 1, value=min(MOST_TOKENS, card.context // 2))
        return header(about(card)), gr.update(choices=depths), most, gr.update(visible=bool(key))

    async def reply(
        message: dict[str, Any], history: list[dict[str, Any]], depth: str, tokens: float, temperature: float, key: str
    ) -> AsyncIterator[dict[str, Any]]:
        try:
            card = await talk.read_card(with_key(key), model)
        except openai.OpenAIError as error:
            yield talk.fault(error)
            return
        asked = talk.messages(history, message)
        async for state in talk.answer(with_key(key), card, asked, Settings(depth, int(tokens), temperature)):
            yield state

    def with_key(key: str) -> openai.AsyncOpenAI:
        return api.with_options(api_key=key) if key else api

    with gr.Blocks(title="Shoal", analytics_enabled=False, fill_height=True) as page:
        head = gr.HTML(header(), elem_id="head")
        with gr.Row(equal_height=False, elem_id="main"):
            with gr.Column(scale=1, min_width=240, elem_id="settings"):  # first here, on the right on the page
                depth = gr.Radio([AUTO], value=AUTO[1], label="Depth", elem_id="depth")
                tokens = gr.Slider(1, MOST_TOKENS, value=MOST_TOKENS, step=1, label="Most tokens", buttons=[])
                temperature = gr.Slider(
                    0, 2, value=0, step=0.1, label="Temperature", info="0 gives the likeliest answer.", buttons=[]
                )
                key = gr.Textbox(label="API key", type="password", visible=False, info="Then press Enter.")
            with gr.Column(scale=4, min_width=320):
                gr.ChatInterface(
                    reply,
                    multimodal=True,
                    chatbot=_chatbot(),
                    textbox=_textbox(),
                    additional_inputs=[depth, tokens, temperature, key],
                    examples=[[example, None, None, None, None] for example in EXAMPLES.values()],
                    example_labels=list(EXAMPLES),
                    concurrency_limit=AT_ONCE,
                    show_progress="hidden",
                    api_visibility="private",
                )
        shown = [head, depth, tokens, key]
        page.load(describe, key, shown, show_progress="hidden", api_visibility="private")
        key.submit(describe, key, shown, show_progress="hidden", api_visibility="private")
    page.queue(default_concurrency_limit=AT_ONCE)
    return page


def header(said: str = "") -> str:
    """The line on top of the page: who this is, and `said` of the model."""
    return f'<span class="name">Shoal</span><span class="about">{html.escape(said)}</span>'


def about(card: Card) -> str:
    """``tiny · INT8 · 8 layers · 1024 tokens of context``."""
    precision = {"none": ""}.get(card.quantization, "INT8")
    return " · ".join(
        filter(None, (card.name, precision, f"{card.layers} layers", f"{card.context} tokens of context"))
    )


def _chatbot() -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        label="Conversation",
        elem_id="chat",
        height="calc(100dvh - 210px)",
        min_height=320,
        layout="bubble",
        buttons=["copy"],
        latex_delimiters=[],
        placeholder="Pick an example, or write a message below.",
    )


def _textbox() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        show_label=False,
        label="Message",
        placeholder="Write a message, or add a picture",
        file_types=list(IMAGES),
        sources=["upload"],
        stop_btn=True,
        max_lines=8,
    )
