"""Other words for the wordings of symptoms that are learned from, as `shoal augment --synonyms` takes them: in English, as it
finds no words in Chinese. None is a wording that is asked or fitted to, nor a part of one (a test holds that)."""

from __future__ import annotations

from collections.abc import Mapping

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "a fever": ("pyrexia", "a hot body"), "a high temperature": ("a hot body", "a raised temperature"),
    "a cough": ("a barking cough", "a chesty cough"), "coughing": ("barking", "a tickle that makes me cough"),
    "weakness": ("feebleness", "a lack of energy"), "tiredness": ("fatigue", "weariness"),
    "night sweats": ("perspiration at night", "a damp bed"), "a runny nose": ("a streaming nose", "catarrh"),
    "a blocked nose": ("a congested nose", "a nose that lets no air in"),
    "a sore throat": ("an inflamed throat", "a painful throat"), "sneezing": ("sneezing attacks", "an urge to sneeze"),
    "a hoarse voice": ("a husky voice", "a gravelly voice"), "no voice": ("a lost voice", "a whisper for a voice"),
    "nausea": ("feeling sick", "a wish to vomit"), "diarrhoea": ("runny stools", "liquid stools"),
    "loose stools": ("runny stools", "soft stools"), "belly cramps": ("colic", "tummy cramps"),
    "stomach cramps": ("colic", "a tummy in knots"), "no appetite": ("food has no appeal", "a lost appetite"),
    "burning when i urinate": ("scalding when I pee", "a hot feeling when I pee"),
    "frequent urination": ("peeing a lot", "many visits to the loo"), "cloudy urine": ("hazy urine", "turbid urine"),
    "pain low in the belly": ("an ache below the navel", "soreness above the pubic bone"),
    "a headache": ("a sore head", "a hammering head"), "a throbbing head": ("a hammering head", "a pulsing head"),
    "light that hurts": ("eyes that cannot bear light", "squinting in the light"),
    "spots before my eyes": ("floaters", "specks in my view"), "noise that hurts": ("noise I cannot bear", "wincing at noise"),
    "a rash": ("a skin eruption", "bumps on the skin"), "itching": ("pruritus", "a skin that tingles"),
    "dry skin": ("chapped skin", "parched skin"), "watery eyes": ("weepy eyes", "eyes that stream"),
    "back pain": ("backache", "a bad back"), "an aching back": ("backache", "a bad back"),
    "stiffness": ("tightness", "a lack of suppleness"), "tingling in the leg": ("a buzzing leg", "a leg that fizzes"),
    "a numb leg": ("a leg without feeling", "a dead leg"), "muscle pain": ("myalgia", "muscles that hurt"),
    "aching muscles": ("myalgia", "muscles that hurt"),
}  # fmt: skip
