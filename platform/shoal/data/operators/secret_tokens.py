"""Keys and tokens that services give out, found by the patterns of detect-secrets' plugins and some of our own.

Notable: only the plugins' patterns are used. Their `verify` asks the service, over the network, and is never called. A plugin
runs only on a text that holds one of its fixed words, so that most texts cost a search for a few words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module

Span = tuple[int, int]  # where a match begins and ends
# of a word that names a number: in a sentence, and in keys such as "user_phone", "phoneNumber" and "PHONE"
BEFORE = r"(?-i:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"
AFTER = r"(?-i:(?![A-Za-z])|(?<=[a-z])(?=[A-Z]))"

# module and class of a plugin -> fixed words without which it finds nothing. Left out: plugins that take words or file hashes
# for secrets (keywords, entropy, Artifactory, IBM), and public IP addresses, which `pii` has.
PLUGINS = {
    "aws.AWSKeyDetector": ("AKIA", "ASIA", "ABIA", "ACCA", "A3T", "aws", "AWS", "Aws"),
    "azure_storage_key.AzureStorageKeyDetector": ("AccountKey=",),
    "basic_auth.BasicAuthDetector": ("://",),
    "cloudant.CloudantDetector": ("cloudant",),
    "discord.DiscordBotTokenDetector": (".",),
    "github_token.GitHubTokenDetector": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    "gitlab_token.GitLabTokenDetector": ("glpat-", "gldt-", "glft-", "glsoat-", "glrt-", "GR1348941", "glcbt-", "glimt-",
                                         "glptt-", "glagent-", "gloas-"),
    "jwt.JwtTokenDetector": ("eyJ",),
    "mailchimp.MailchimpDetector": ("-us",),
    "npm.NpmDetector": ("_authToken",),
    "openai.OpenAIDetector": ("T3BlbkFJ",),
    "pypi_token.PypiTokenDetector": ("pypi-",),
    "sendgrid.SendGridDetector": ("SG.",),
    "slack.SlackDetector": ("xox", "hooks.slack.com"),
    "softlayer.SoftlayerDetector": ("softlayer",),
    "square_oauth.SquareOAuthDetector": ("sq0csp-",),
    "stripe.StripeDetector": ("k_live_",),
    "telegram_token.TelegramBotTokenDetector": (":",),
    "twilio.TwilioKeyDetector": ("AC", "SK"),
}  # fmt: skip
# What detect-secrets has no pattern for, or an older one.
_OWN = re.compile(
    r"(?<![\w-])(?:(?:sk|pk|rk)[-_](?:[A-Za-z]+[-_]){0,3}[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic, Stripe's test keys
    r"|github_pat_\w{22,}|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}|xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"
    r"|AIza[0-9A-Za-z_-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}"  # Google
    r"|whsec_[A-Za-z0-9]{24,}|do[opr]_v1_[a-f0-9]{64}|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|dapi[a-f0-9]{32}|sq0atp-[\w-]{22})(?![\w-])"
)
_OWN_WORDS = ("sk", "pk", "rk", "github_pat_", "hf_", "npm_", "xox", "xapp-", "AIza", "ya29.", "GOCSPX-", "_v1_", "shp",
              "dapi", "sq0atp-", "whsec_")  # fmt: skip
# Of these group 1 is the secret. The plugins want a user's name and no signs in a URL, and quotes around a key.
_WITH_NAMES = {
    "://": re.compile(r"://[^\s/:?#\"'<>`,|]{0,200}:([^\s/?#\"'<>`,|]{1,500})@(?=[^\s@])"),
    "ecret": (_AWS := re.compile(
        r"(?i:aws.{0,20}?key|secret_?access_?key|session_?token)[\"']?\s{0,3}(?:[:=]|=>)\s{0,3}[\"']?"
        r"([A-Za-z0-9/+]{40}|[A-Za-z0-9/+=]{100,2000})(?![A-Za-z0-9/+=])"
    )),
    "ECRET": _AWS,
    "oken": _AWS,
    "OKEN": _AWS,
    "discord": re.compile(r"discord(?:app)?\.com/api/webhooks/(\d{5,30}/[\w-]{30,200})"),
    "/bot": re.compile(r"/bot(\d{8,10}:[A-Za-z0-9_-]{35})(?![\w-])"),
}  # fmt: skip
# what stands where a program, or who reads, puts a password
_PLACEHOLDER = re.compile(
    r"\$?\{[^{}]*\}|\{\{[^{}]*\}\}|\$\w+|\$\([^()]*\)|%\(\w+\)s|%\w+%|%s|<[^<>]*>|\[[^]]*\]|\*+|\.+"
)
# The whole block: a header alone is what programs look for. Without an end, as far as lines of base64 go.
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:(?!-----).){40,20000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:(?:\\+[nr]|[\s\"'+,>#*|])*[A-Za-z0-9+/=]{40,})+)"
    r"|PuTTY-User-Key-File-[23]:(?:(?!PuTTY-).){40,20000}?Private-MAC: [0-9a-f]+",
    re.DOTALL,
)
_TAIL = re.compile(r"[\w=-]*(?:\.[\w=-]+)*")  # what still belongs to a token of which a pattern finds the beginning
# of these group 1 is the secret
_WITHIN = frozenset({"AWSKeyDetector", "BasicAuthDetector", "NpmDetector", "SoftlayerDetector"})
_DIGIT = re.compile(r"\d")
_RUN = re.compile(r"[A-Za-z0-9]{10,}")
# A plugin's pattern looks at so many characters at once, and again from so many on: some take the square of what they look at,
# which a client writes. What begins in the overlap is longer than any pattern asks for.
WINDOW, STEP = 2048, 1536
LONGEST = 2**14  # characters of a token behind what a pattern finds of it


def secret_spans(text: str) -> Iterator[Span]:
    """Where keys, tokens, private keys and passwords in URLs stand in `text`; spans may overlap."""
    if "PRIVATE KEY" in text or "PuTTY-User-Key-File" in text:
        yield from (found.span() for found in _PRIVATE_KEY.finditer(text))
    if any(word in text for word in _OWN_WORDS):
        for found in _OWN.finditer(text):
            if any(map(_DIGIT.search, _RUN.findall(found[0]))):  # "sk_" begins names as well
                yield found.span()
    for pattern in {pattern: None for word, pattern in _WITH_NAMES.items() if word in text}:
        yield from (found.span(1) for found in pattern.finditer(text) if not _PLACEHOLDER.fullmatch(found[1]))
    for name, words, patterns, valid in _plugins():
        if any(word in text for word in words):
            for pattern in patterns:
                yield from _found(text, name, words, pattern, valid)


def _found(
    text: str, name: str, words: Sequence[str], pattern: re.Pattern[str], valid: Callable[[str], bool] | None
) -> Iterator[Span]:
    """What a plugin's `pattern` finds, window by window."""
    within, done = name in _WITHIN and pattern.groups > 0, 0
    for at in range(0, len(text), STEP):
        if not any(text.find(word, at, at + WINDOW) >= 0 for word in words):
            continue
        for found in pattern.finditer(text, max(at, done), at + WINDOW):
            start, end = found.span(1 if within else 0)
            if start < done or (not within and start and text[start - 1].isalnum()):  # the middle of a longer word
                continue
            if not within and (tail := _TAIL.match(text, end, end + LONGEST)) is not None:
                end = tail.end()
            done = end
            if not (within and _PLACEHOLDER.fullmatch(text, start, end)) and (valid is None or valid(text[start:end])):
                yield start, end


@cache
def _plugins() -> list[tuple[str, tuple[str, ...], tuple[re.Pattern[str], ...], Callable[[str], bool] | None]]:
    """Of each plugin its name, words and patterns, and the check of a match. Loaded for the first text."""
    found = []
    for path, words in PLUGINS.items():
        module, name = path.split(".")
        plugin = getattr(import_module(f"detect_secrets.plugins.{module}"), name)
        found.append((name, words, tuple(plugin.denylist), getattr(plugin, "is_formally_valid", None)))
    return found
