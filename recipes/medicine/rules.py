"""THE RULES HERE ARE MADE UP FOR TESTING A PROGRAM. THEY ARE NO MEDICAL ADVICE, and nobody with medical training has read them.

A case has symptoms, of which those of one pattern are most; days; age; history; and perhaps a red flag.

    pattern      symptoms of a kind -> causes, examinations, and an urgency to begin with
    a step up    where it lasts `LONG` days or more, and one where who asks is `OLD` or older, or has diabetes
    never above  TODAY, but for a red flag, which is an emergency
    no pattern   fewer than two symptoms of any: cannot tell
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recipes.medicine import words
from shoal.api.policy import ChatPage, Flag, Policy, Urgency
from shoal.config import FULL

SELF_CARE, APPOINTMENT, TODAY, EMERGENCY = LEVELS = ("self-care", "appointment", "today", "emergency")
CANNOT_TELL = "cannot tell"  # of what is out of scope
LONG, OLD, FEWEST = 3, 65, 2  # days, years, symptoms of a pattern


@dataclass(frozen=True)
class Pattern:
    symptoms: tuple[str, ...]
    causes: Mapping[str, tuple[str, ...]]
    examinations: Mapping[str, tuple[str, ...]]
    urgency: str


def _pattern(urgency: str, symptoms: str, causes: str, examinations: str, chinese: str) -> Pattern:
    zh = [tuple(part.split("、")) for part in chinese.split("；")]
    en = [tuple(part.split(", ")) for part in (causes, examinations)]
    return Pattern(
        tuple(symptoms.split(", ")), {"en": en[0], "zh": zh[0]}, {"en": en[1], "zh": zh[1]}, urgency
    )  # fmt: skip


PATTERNS = (
    _pattern(APPOINTMENT, "fever, cough, sweats, weakness", "influenza, pneumonia", "chest X-ray, blood test",
             "流感、肺炎；胸部X光、血常规"),
    _pattern(SELF_CARE, "runny nose, sore throat, sneezing, hoarseness", "common cold, throat infection", "throat swab",
             "普通感冒、咽炎；咽拭子"),
    _pattern(SELF_CARE, "nausea, diarrhoea, cramps, no appetite", "gastroenteritis, food poisoning", "stool test, blood test",
             "肠胃炎、食物中毒；大便检查、血常规"),
    _pattern(APPOINTMENT, "burning urine, frequent urine, cloudy urine, low belly pain", "urinary infection, bladder stone",
             "urine test, ultrasound", "尿路感染、膀胱结石；尿常规、超声"),
    _pattern(APPOINTMENT, "headache, light hurts, seeing spots, noise hurts", "migraine, tension headache",
             "blood pressure, nerve examination", "偏头痛、紧张性头痛；量血压、神经检查"),
    _pattern(SELF_CARE, "rash, itching, dry skin, watery eyes", "allergy, eczema", "allergy test, skin examination",
             "过敏、湿疹；过敏原检查、皮肤检查"),
    _pattern(SELF_CARE, "back pain, stiffness, leg tingling, muscle pain", "muscle strain, slipped disc",
             "physical examination, spine X-ray", "肌肉拉伤、椎间盘突出；体格检查、脊柱X光"),
)  # fmt: skip

NOTICE = {
    "en": "Notice: a test program with made-up rules wrote this. It is no medical advice; ask a doctor.",
    "zh": "注意：这是按虚构规则训练的测试程序的回答，不是医疗建议，请咨询医生。",
}
EXAMPLES = (  # the mission's
    "I have had a fever, a cough and weakness for three days.", "我发烧、咳嗽和乏力已经三天了。",
)  # fmt: skip
TOLD = {
    EMERGENCY: {
        "en": "Red flag ({words}): whatever follows says, treat this as an emergency.",
        "zh": "危险信号（{words}）：无论下文怎么说，请按急症处理。",
    }
}
# words of a person's, not the wordings of the cases: stems, and pairs of them in one sentence; a flag that is a lack has its
# "no" among its words, which would take it back otherwise. Those of doctors' words are stems of names and synonyms in the Human
# Phenotype Ontology (hp.obo of 2025-01-16). Chinese in simplified letters: `policy` adds the traditional ones
FLAG_WORDS: Mapping[str, tuple[str, ...]] = {
    "chest pain": (
        "chest + pain", "chestpain", "heart attack", "chest + tight", "chest + press", "chest + crush", "chest + stab",
        "chest + hurt", "chest + ache", "chest + discomfort", "chest + distress", "thoracic pain", "precordial", "angina",
        "胸痛", "胸闷", "心绞痛", "胸口", "胸 + 痛", "胸 + 疼",
    ),
    "short of breath": (
        "breath", "no breath", "not breath", "without breath", "不呼吸", "没有呼吸了", "没了呼吸",
        "suffocat", "chok", "panting", "dyspn", "orthopn", "apnea", "apnoea", "apneic", "respiratory distress",
        "respiratory difficult", "respiratory failure", "spontaneous respiration",
        "呼吸", "喘不", "气喘", "喘气", "气短", "透不过气", "憋气",
    ),
    "fainting": (
        "faint", "passed out", "pass out", "passing out", "black out", "blacking out", "syncop", "unconscious",
        "consciousness", "no consciousness", "not conscious", "without consciousness", "没有意识了", "没了意识", "无意识",
        "blacked out", "collaps", "vasovagal", "coma", "stupor", "trance", "vegetative state",
        "晕倒", "晕过去", "昏", "失去意识", "不省人事",
    ),
    "one side weak": (
        "stroke", "one side + weak", "one side + numb", "one arm + hang", "one arm + weak", "droop", "slur", "face + hang",
        "one side + paraly", "hemipar", "hemipleg", "cerebrovascular", "cerebral vascular", "facial + palsy", "facial + paraly",
        "facial + paresis", "facial + weak", "nerve palsy", "bell's palsy", "dysarthri", "articulating speech",
        "bleeding in + brain", "cerebral hemorrhage", "cerebral haemorrhage", "intracerebral", "中风",
        "半边", "半身", "一只手 + 抬", "嘴歪", "口角", "说话含糊", "偏瘫",
    ),
    "vomiting blood": (
        "blood + vomit", "blood + threw up", "blood + throw", "cough + up blood", "coughing blood", "coughed blood",
        "cough blood", "blood + spit", "blood + spat", "bloody", "hematemesis", "haematemesis", "hemoptysis", "haemoptysis",
        "吐血", "呕血", "咳血", "血 + 吐", "血 + 呕",
    ),
    "stiff neck": (
        "neck + stiff", "neck + rigid", "neck + not bend", "neck + bend", "neck + lock", "nuchal", "meningism",
        "脖子 + 僵", "脖子 + 硬", "脖子不能", "颈",
    ),
    "swollen tongue": (
        "tongue + swell", "tongue + swoll", "lips + swell", "lips + swoll", "throat + swell", "swell + throat",
        "throat + swoll", "lip + swell", "lip + swoll", "lip + edemat", "angioedema", "angiooedema", "angioneurotic", "quincke",
        "tongue + edema", "tongue + oedema", "laryngeal edema", "laryngeal oedema",
        "舌 + 肿", "嘴唇 + 肿", "喉咙肿",
    ),
    "confusion": ("confus", "disorient", "no idea where", "deliri", "神志", "糊涂", "胡话", "意识模糊", "不知道自己"),
}  # fmt: skip

# of the letters in these words
_TRADITIONAL = str.maketrans("气过晕识无没边说话瘫呕颈肿闷只咙涂风绞", "氣過暈識無沒邊說話癱嘔頸腫悶隻嚨塗風絞")


@dataclass(frozen=True)
class Case:
    """What is known of who asks."""

    symptoms: tuple[str, ...]
    days: int
    age: int
    history: str
    red_flag: str = ""


@dataclass(frozen=True)
class Assessment:
    urgency: str
    causes: tuple[str, ...] = ()
    examinations: tuple[str, ...] = ()


def assessed(case: Case, language: str) -> Assessment:
    """What the rules say of a case."""
    pattern = max(PATTERNS, key=lambda one: len(set(one.symptoms) & set(case.symptoms)))
    if len(set(pattern.symptoms) & set(case.symptoms)) < FEWEST:
        return Assessment(EMERGENCY if case.red_flag else CANNOT_TELL)
    steps = (case.days >= LONG) + (case.age >= OLD or case.history == "diabetes")
    level = min(LEVELS.index(pattern.urgency) + steps, LEVELS.index(TODAY))
    urgency = EMERGENCY if case.red_flag else LEVELS[level]
    return Assessment(urgency, pattern.causes[language], pattern.examinations[language])


def policy() -> Policy:
    """What is served with a model: the notice, the rule that may only raise, full depth, and the words of its page."""
    flags = tuple(Flag(name, EMERGENCY, _in_both(words)) for name, words in FLAG_WORDS.items())
    denied = {"en": ("no", "not", "without", "never"), "zh": _in_both(("没有", "无", "不"))}
    urgency = Urgency("urgency", LEVELS, flags, TOLD, unless_after=denied)
    return Policy(NOTICE, FULL, urgency=urgency, page=ChatPage("medicine", words.SYSTEM, tuple(EXAMPLES)))


def _in_both(some: Sequence[str]) -> tuple[str, ...]:
    """Words, and behind them those in traditional letters that differ: Hong Kong and Taiwan write 嘔血 for 呕血."""
    return tuple(dict.fromkeys([*some, *(one.translate(_TRADITIONAL) for one in some)]))


def all_of(language: str, kind: str) -> Sequence[str]:
    """All causes, or all examinations, of the table."""
    return list(dict.fromkeys(one for pattern in PATTERNS for one in getattr(pattern, kind)[language]))
