"""Personal data and secrets: kinds that are found in each of their usual forms, what stays, and texts that hold none."""

from __future__ import annotations

import base64
import json
import socket
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
from detect_secrets import plugins
from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

from shoal.data.operators import secret_tokens
from shoal.data.operators.pii import ALL, merged, scrubbed

_HEX = "0123456789abcdef" * 4
_BEGIN_RSA = "-----BEGIN RSA " + "PRIVATE KEY-----"  # in two, so that nothing takes it for a key
_KEY = "\n".join(["MIIEpAIBAAKCAQEAu1SU1LfVLPHCozMxH2Mo4lgOEePzNm0tRgeLezV6ffAt0gun"] * 3)
# Tokens are put together here, so that no scanner takes this file for one that leaks them.
KINDS: dict[str, list[str]] = {
    "e-mail address": ["ann.lee+news@mail.example.org", "ANN@EXAMPLE.DE"],
    "public IPv4 address": ["8.8.8.8"],
    "public IPv6 address": ["2001:4860:4860::8888"],
    "telephone with country code": [
        "+49 30 1234 5678", "+49 (0)30 12345678", "+44 20 7946 0958", "+33 6 12 34 56 78", "+1-212-555-0143", "+919876543210",
        "+86 138 0013 8000", "0049 30 12345678",
    ],
    "American telephone": ["(212) 555-0143", "212-555-0143", "212.555.0143", "1-800-555-0199"],
    "European telephone": ["030 12345678", "030/12345678", "(030) 12345678", "0171 1234567", "020 7946 0958", "01 23 45 67 89",
                           "06.12.34.56.78", "02 1234 5678", "044 668 18 00"],
    "telephone elsewhere": ["(11) 91234-5678", "8 (495) 123-45-67", "03-1234-5678", "138 0013 8000",
                            "(02) 9374 4000", "0412 345 678"],
    "telephone after a word": ["Phone: 07700 900123", "Tel. 612 345 678", "mobile 98765 43210", "fax no. 5551234"],
    "bank account (IBAN)": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR14 2004 1010 0505 0001 3M02 606",
                            "NL91-ABNA-0417-1643-00", "be68539007547034", "NO93\u00a08601\u00a01117\u00a0947"],
    "payment card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "3782 822463 10005", "6011111111111117"],
    "passport": ["Passport No. 533380006", "passport number: C01X00T47", "Reisepass C01X00T47", "passeport n\u00b0 12AB34567",
                 "P<UTOERIKSSON<<ANNA<MARIA<<<<<<<<<<<<<<<<<<<\nL898902C36UTO7408122F1204159ZE184226B<<<<<10"],
    "American social security number": ["078-05-1126", "SSN 219-09-9998", "social security number 536904399"],
    "European identity number": ["RSSMRA85T10A562S", "12345678Z", "X1234567L", "2 55 08 14 168 025 38", "AB 12 34 56 C",
                                 "131052-308T", "85.07.30-033.28", "756.9217.0769.85", "BSN 111222333", "PESEL 44051401359",
                                 "Steuer-ID 36 574 261 809"],
    "identity number elsewhere": ["390.533.447-05", "11010519491231002X", "BOXW310820HNERXN09", "ABCPD1234E", "2341 2341 2346"],
    "AWS key": ["AKIA" + "IOSFODNN7EXAMPLE", "aws_secret_access_key = '" + "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY'"],
    "GitHub token": ["ghp_" + "a1B2" * 9, "github_" + "pat_" + "11ABCDEFG0" * 5],
    "GitLab token": ["glpat-" + "a1B2c3D4e5" * 2],
    "Slack token or webhook": ["xoxb-" + "123456789012-1234567890123-a1B2c3D4e5F6",
                               "https://hooks.slack.com/services/" + "T00000000/B00000000/a1B2c3D4e5F6"],
    "Stripe key": ["sk_live_" + "51Habcdefghijklmnopqrstu", "rk_" + "test_" + "51Habcdefghijklmnopqrstu"],
    "key of a model's API": ["sk-proj-" + "abcDEF1234567890abcd", "sk-ant-api03-" + "a1B2c3D4e5" * 4, "hf_" + "a1B2c3D4e5" * 4],
    "Google or Azure key": ["AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q", "AccountKey=" + "a1B2c3D4" * 11],
    "token of other services": ["SG." + "a1B2c3D4e5F6g7H8i9J0k1" + "." + "a1B2c3D4e5" * 4 + "abc", "npm_" + "a1B2" * 9,
                                "pypi-" + "AgEIcHlwaS5vcmc" + "a1B2c3D4e5" * 8, "SK" + _HEX[:32], _HEX[:32] + "-us12",
                                "123456789:" + "a1B2c3D4e5" * 3 + "f6G7h", "dop_v1_" + _HEX],
    "JSON web token": ["eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0u1V"],
    "private key or password in a URL": [
        f"{_BEGIN_RSA}\n{_KEY}\n-----END RSA PRIVATE KEY-----",
        f"{_BEGIN_RSA.replace('RSA', 'OPENSSH')}\n{_KEY}\n", "postgres://ann:hunter2secret@db/orders",
    ],
}  # fmt: skip
STAYS = ["Ann Lee", "12 Baker Street, London NW1 6XE", "born on 1984-03-12", "ann at example dot org", "password: hunter2",
         "+one two one two", "10.0.0.7"]  # fmt: skip
WORDS = ("Phone: ", "Tel. ", "mobile ", "fax no. ", "Passport No. ", "passport number: ", "Reisepass ", "passeport n\u00b0 ",
         "SSN ", "social security number ", "BSN ", "PESEL ", "Steuer-ID ", "aws_secret_access_key = ",
         "postgres://ann:")  # fmt: skip


def _left(text: str) -> str:
    return scrubbed(text, ALL, Counter())


# A kind is not only looked for where a space parts it from the rest.
WITHIN = ["KEY={}", "key: '{}'", '{{"a": "hello\\n{}\\nbye"}}', '{{"log": "\\\\t{}\\\\n"}}', '"{{\\"k\\": \\"{}\\"}}"',
          "?a=%20{}%20", "a&nbsp;{}&lt;br&gt;", "\x1b[31m{}\x1b[0m", "_{}_", "__{}__", "\u7535\u8bdd{}\u53f7", "{}\ub85c",
          "`{}`", "<td>{}</td>", "a,{},b"]  # fmt: skip


@pytest.mark.parametrize("within", WITHIN)
def test_each_form_is_found_wherever_programs_write_it(within: str) -> None:
    missed = {}
    for form in (form for forms in KINDS.values() for form in forms):
        left = _left(within.format(form))
        secret = form.removeprefix(next(filter(form.startswith, WORDS), "")).removesuffix("@db/orders")
        if "[" not in left.replace("\x1b[", "") or any(
            piece.strip("'") in left for piece in secret.split() if sum(map(str.isalnum, piece)) > 3
        ):
            missed[form] = left
    assert not missed


def test_what_is_escaped_is_found_as_it_will_be_read_and_no_more_goes() -> None:
    assert _left("to=ann%40example.org&x=1") == "to=[email]&x=1"
    assert _left("ann&#64;example.org, &#1;&#1;ann\\u0040example.org!") == "[email], &#1;&#1;[email]!"
    assert _left('"a\\n+49\\u00a030 1234\\u00a05678\\n"') == '"a\\n[phone]\\n"'
    assert _left(r"https:\/\/ann:s3cret@example.org") == r"https:\/\/ann:[secret]@example.org"


def test_a_number_beside_another_is_found_where_it_begins_and_ends_by_itself() -> None:
    """As in logs and tables: what holds no spaces, and no other number within."""
    others = ("American telephone", "bank account (IBAN)", "payment card", "American social security number",
              "telephone with country code")  # fmt: skip
    forms = [form for kind in others for form in KINDS[kind] if " " not in form]
    missed = {form: left for form in forms if form in (left := _left(f"17 {form} 200 5"))}
    assert len(forms) > 10 and not missed
    assert _left("1 4111 1111 1111 1111") == "1 [card]" and _left("(212) 555-0143 (212) 555-0199") == "[phone] [phone]"
    rows = "\n".join(f"{n} {n * 7919 % 997} {n * 104729 % 99991} {n * 31 % 10}" for n in range(2000))
    assert _left(rows) == rows


_AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        *((f"{url}@db:6379/0", "s3cret") for url in ("redis://:{}", "postgres://ann@corp:{}", "smtp://ann%40example.org:{}",
                                                     "ftp://ann:{}$&!", "ftp://ann:a@{}")),
        *((key, _AWS_SECRET) for key in ("AWS_SECRET_ACCESS_KEY={}", "aws_secret_access_key = {}", '"SecretAccessKey": "{}"',
                                         "secretAccessKey: {}")),
        ("discord.com/api/webhooks/123456789012345678/{}", "a1B2c3D" * 9), ("api.telegram.org/bot123456789:{}/", "a1B2c" * 7),
        *((key, "5551234567") for key in ('"phone_number": "{}"', "userPhone={}", "| Phone | {} |", "<phones>{}</phones>")),
        ('"passportNumber": "{}"', "533380006"), ("my_ssn: {}", "536904399"),
    ],
)  # fmt: skip
def test_secrets_and_numbers_are_found_in_settings_and_urls(text: str, secret: str) -> None:
    assert secret not in _left(text.format(secret))


@pytest.mark.parametrize(
    "text",
    ["postgres://{user}:{password}@{host}", "http://%s:%s@%s", "https://$USER:$PASS@h", "http://<user>:<password>@h", "ftp://u:***@h",
     "amqp://u:${PASS}@h", "amqp://u:{{ pass }}@h", "hotel 1234567", "tel_5551234", "stem_cells[1234567]"],
)  # fmt: skip
def test_a_place_for_a_password_and_a_word_in_a_word_stay(text: str) -> None:
    assert _left(text) == text


def test_there_are_24_kinds_and_each_is_found_in_all_its_forms() -> None:
    assert len(KINDS) == 24
    missed = {}
    for forms in KINDS.values():
        for form in forms:
            for text in (
                f"Ann wrote: {form}",
                f"before\n{form}\nafter it",
                f'{{"note": "{form}"}}',
                f"({form}), she said.",
            ):
                left = _left(text)
                secret = form.removeprefix(next(filter(form.startswith, WORDS), ""))
                pieces = [
                    piece for piece in secret.removesuffix("@db/orders").split() if sum(map(str.isalnum, piece)) > 3
                ]
                if any(piece.strip("'") in left for piece in pieces) or "[" not in left:
                    missed[text] = left
    assert not missed


@pytest.mark.parametrize("text", STAYS)
def test_what_the_page_says_is_not_found_stays(text: str) -> None:
    assert _left(text) == text


def test_at_most_one_in_a_thousand_clean_lines_is_touched() -> None:
    """Of Python's own library and of these pages. E-mail addresses in them are real ones."""
    lines = [
        line
        for path in [*sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), *sorted(Path("docs").rglob("*.md"))]
        for line in path.read_text("utf-8", "replace").splitlines()
        if line.strip()
    ]
    kinds = tuple(kind for kind in ALL if kind != "email")
    touched = [line for line in lines if scrubbed(line, kinds, Counter()) != line]
    assert len(lines) > 50_000
    assert len(touched) <= len(lines) / 1000, touched[:20]


def test_every_service_of_detect_secrets_is_used_or_left_out_by_name() -> None:
    """A new version of the library may bring one."""
    found = {kind.__name__ for kind in get_mapping_from_secret_type_to_class().values()}
    left_out = {"ArtifactoryDetector", "Base64HighEntropyString", "HexHighEntropyString", "IbmCloudIamDetector",
                "IbmCosHmacDetector", "IPPublicDetector", "KeywordDetector", "PrivateKeyDetector"}  # fmt: skip
    assert {path.split(".")[1] for path in secret_tokens.PLUGINS} | left_out == found, plugins.__path__


def test_nothing_is_asked_over_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert all("[" in _left(form) for forms in KINDS.values() for form in forms)


def test_a_private_key_that_a_program_only_looks_for_stays() -> None:
    text = f'if "{_BEGIN_RSA}" in data or "-----END RSA PRIVATE KEY-----" in data:\n    refuse(data)\n'
    assert _left(text) == text


def test_no_part_of_a_token_stays_and_words_behind_an_account_do() -> None:
    token = "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + "a1B2c3D4e5F6"
    assert _left(f"a {token}, b") == "a [secret], b"
    assert _left("DE89370400440532013000 BANK") == "[iban] BANK" and _left("BE68 5390 0754 7034 BANK") == "[iban] BANK"


def test_what_stands_anywhere_in_a_long_line_is_found() -> None:
    tokens = [form for kind in ("GitHub token", "JSON web token", "AWS key", "GitLab token") for form in KINDS[kind]]
    for token in tokens:
        for before in range(1300, 2100, 7):
            assert "[secret]" in _left("x" * before + " " + token + " " + "x" * 3000)
    payload = base64.urlsafe_b64encode(json.dumps({"sub": "x" * 9000}).encode()).decode().rstrip("=")
    assert _left(f"{'x ' * 800}eyJhbGciOiJIUzI1NiJ9.{payload}.a1b2 z") == f"{'x ' * 800}[secret] z"


@pytest.mark.parametrize(
    "piece",
    ["eyJ", "eyJa.", "xoxb-1-", "//a/:_authToken=", "PuTTY-User-Key-File-2:", "glpat-", "sk-", "aws key ", "GB12 ", "+1 1 ",
     "tel ", f"{_BEGIN_RSA}\n", "://a:", "12345678:", "passport no ", "1 2\n11\n", "\\", "%41", "&#64;", "_a", "\u53f7a", "://:a@",
     "aws key=", "/bot", "\\na@", "phone_no"],
)  # fmt: skip
def test_no_text_takes_the_square_of_its_length(piece: str) -> None:
    """A fifth of a megabyte that a client wrote took 70 s. In seconds of this process, generously."""
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    _left(text)
    assert time.process_time() - start < 15


def test_spans_that_overlap_are_one() -> None:
    assert merged([(5, 8), (0, 3), (7, 9), (3, 4), (5, 8)]) == [(0, 3), (3, 4), (5, 9)]
