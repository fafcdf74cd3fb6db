"""What the Human Phenotype Ontology calls the symptoms: English names and synonyms, so that some of the words are another
author's than the rules'.

This uses the Human Phenotype Ontology, release 2025-01-16 (http://www.human-phenotype-ontology.org; Gargano et al., "The Human
Phenotype Ontology in 2024", Nucleic Acids Research 52). Its licence lets names be copied unaltered, with this acknowledgement
and the release. They are of its file hp.obo, SHA-256 6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5, but for
capitals; a test looks each up there. Which terms say one of our symptoms was picked by reading, by no doctor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """What terms call one symptom; `asked`: no row that is learned from or fitted to has these."""

    terms: tuple[str, ...]
    learned: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


# left out are plurals, and what has a wording of the other side within it, or is within one: it would be nothing unseen
NAMES: Mapping[str, Names] = {
    "fever": Names(("HP:0001945",), ("pyrexia",), ("hyperthermia",)),
    "cough": Names(
        ("HP:0031245", "HP:0031246"), ("wet cough", "cough with mucus production"), ("productive cough", "nonproductive cough")
    ),
    "weakness": Names(
        ("HP:0001324", "HP:0012378", "HP:0025406"),
        ("fatigue", "muscle weakness", "lack of energy and strength"), ("asthenia", "prostration"),
    ),
    "sweats": Names(("HP:0030166",), (), ("nocturnal hyperhidrosis",)),
    "runny nose": Names(
        ("HP:0001742", "HP:0031417"),
        ("nasal congestion", "nasal discharge", "blockage of nose"), ("nasal obstruction", "rhinorrhea", "stuffy nose"),
    ),
    "sore throat": Names(("HP:0033050",), ("pharyngodynia", "throat discomfort"), ("pharyngalgia", "throat pain")),
    "sneezing": Names(("HP:0025096",), ("paroxysmal sneezing",)),
    "hoarseness": Names(
        ("HP:0001609", "HP:0001618", "HP:0001686"),
        ("husky voice", "loss of voice", "voice change"), ("aphonia", "dysphonia", "inability to produce voice sounds"),
    ),
    "diarrhoea": Names(("HP:0002014",), ("watery stool",), ("diarrhea",)),
    "cramps": Names(
        ("HP:0002027", "HP:0032155"),
        ("abdominal discomfort", "pain in stomach"), ("abdominal cramps", "abdominal pain", "gastro pain"),
    ),
    "no appetite": Names(("HP:0002039", "HP:0004396"), ("decreased appetite",), ("anorexia", "poor appetite")),
    "burning urine": Names(
        ("HP:0100518",), ("dull burning sensation with urination",), ("dysuria", "painful or difficult urination")
    ),
    "frequent urine": Names(
        ("HP:0000012", "HP:0100515"), ("constant urination", "urgent micturition"), ("pollakisuria", "urinary urgency")
    ),
    "cloudy urine": Names(("HP:0012088", "HP:0031967"), ("turbid urine",), ("abnormal urinary odor",)),
    "low belly pain": Names(("HP:0032171", "HP:0034267"), ("pelvic pain",), ("bladder pain", "pain in the pelvis")),
    "headache": Names(("HP:0002331",), (), ("recurrent paroxysmal headache",)),
    "light hurts": Names(
        ("HP:0000613",),
        ("light hypersensitivity", "photodysphoria"), ("photophobia", "extreme sensitivity of the eyes to light"),
    ),
    "seeing spots": Names(
        ("HP:0010822", "HP:0030786", "HP:0100832"),
        ("eye floaters", "spots in front of eyes"), ("photopsia", "scintillating scotoma"),
    ),
    "noise hurts": Names(("HP:0002183", "HP:0010780"), ("fear of loud sounds",), ("hyperacusis", "phonophobia")),
    "rash": Names(("HP:0000988", "HP:0001025", "HP:4000054"), ("skin rash",), ("exanthem", "urticaria")),
    "itching": Names(("HP:0000989",), ("pruritus",)),
    "dry skin": Names(("HP:0000958",), (), ("xerosis",)),
    "watery eyes": Names(("HP:0009926",), ("increased tears",), ("epiphora", "increased lacrimation")),
    "back pain": Names(("HP:0003419",), ("lower back pain",), ("lumbago",)),
    "stiffness": Names(("HP:0001387", "HP:0003552"), ("joint stiffness", "muscle stiffness"), ("stiff joint",)),
    "leg tingling": Names(("HP:0003401",), ("pins and needles feeling",), ("paresthesia",)),
    "muscle pain": Names(("HP:0003326",), ("myalgia",)),
}  # fmt: skip
