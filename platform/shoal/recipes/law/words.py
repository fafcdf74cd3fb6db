"""Questions about a licence, in several wordings of each matter; of each the last two are only asked, the one before them is
what the router is fitted to (`splits.py:of_split`)."""

from __future__ import annotations

from collections.abc import Mapping

SYSTEM = "You answer questions about licence texts, for a test."

ASKED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "en": {
        "change": (
            "May I change it?", "Can I modify the code?", "Am I allowed to change it?", "Is it fine to edit it?",
            "Could I adapt it?", "May I rework it?",
        ),
        "sell": (
            "May I sell it?", "Can I take money for it?", "Am I allowed to sell copies?", "May I use it in a shop?",
            "Could I charge for it?", "Is a paid product fine?",
        ),
        "terms": (
            "May I put my changes under other terms?", "Can I sublicense it?", "May I choose another licence?",
            "Can my changes have their own licence?", "Could I relicense my version?",
            "Are other terms for my part fine?",
        ),
        "patents": (
            "May I use its patents?", "Do I get a patent licence?", "Are patents covered?",
            "Can I rely on its patents?", "Could I practise the patents?", "Is there a grant of patents?",
        ),
        "notice": (
            "May I remove the notice?", "Can I leave out the copyright line?", "May I delete the notices?",
            "Can I drop its notice?", "Could I strip the copyright?", "Is it fine to cut the notice?",
        ),
        "blame": (
            "Can I sue the authors for damages?", "Are the authors liable?", "May I claim damages?",
            "Do they pay for a loss?", "Could I hold them responsible?", "Will they compensate harm?",
        ),
        "warranty": (
            "Is there a warranty?", "May I rely on a warranty?", "Do they warrant that it works?", "Is it warranted?",
            "Could I count on a guarantee?", "Do they promise fitness?",
        ),
        "endorse": (
            "May I advertise with their name?", "Can I use their trademark?", "May I say that they endorse me?",
            "Can I use their name in an ad?", "Could I print their logo?", "Is their brand mine to use?",
        ),
        "unmarked": (
            "May I hide that I changed it?", "Can I leave my changes unmarked?",
            "May I pass on changes without saying so?", "Can I keep quiet about my changes?",
            "Could I conceal my edits?", "Is it fine to say nothing of edits?",
        ),
    },
    "zh": {
        "change": (
            "我可以修改它吗？", "能改代码吗？", "允许修改吗？", "可以编辑它吗？", "我能改编它吗？", "可以改写吗？",
        ),
        "sell": (
            "我可以卖它吗？", "能收费吗？", "允许出售副本吗？", "可以商用吗？", "我能拿它赚钱吗？",
            "收费产品可以用吗？",
        ),
        "terms": (
            "我的修改可以用别的条款吗？", "能再许可吗？", "可以选别的许可证吗？", "我的修改能有自己的许可证吗？",
            "我能换许可证吗？", "我的部分用别的条款行吗？",
        ),
        "patents": (
            "可以用它的专利吗？", "有专利许可吗？", "包括专利吗？", "能依靠它的专利吗？", "我能实施专利吗？",
            "授予专利了吗？",
        ),
        "notice": (
            "可以删掉声明吗？", "能去掉版权行吗？", "可以删除版权声明吗？", "能省略声明吗？", "我能抹掉版权吗？",
            "不写声明行吗？",
        ),
        "blame": (
            "可以向作者索赔吗？", "作者要负责吗？", "可以要求赔偿吗？", "损失他们赔吗？", "我能追究他们吗？",
            "他们补偿损害吗？",
        ),
        "warranty": (
            "有担保吗？", "可以依靠担保吗？", "他们保证能用吗？", "有质量保证吗？", "我能指望保修吗？",
            "他们承诺适用吗？",
        ),
        "endorse": (
            "可以用他们的名字做广告吗？", "能用他们的商标吗？", "可以说他们支持我吗？", "广告里能用他们的名字吗？",
            "我能印他们的标志吗？", "他们的品牌我能用吗？",
        ),
        "unmarked": (
            "可以隐瞒我的修改吗？", "修改可以不标明吗？", "可以不说明就传播修改吗？", "能不提我的修改吗？",
            "我能掩盖改动吗？", "不说改动行吗？",
        ),
    },
}  # fmt: skip
PERMITTED = {"en": "Permitted", "zh": "允许"}
FORBIDDEN = {"en": "Not permitted", "zh": "不允许"}
SILENT = {"en": "The text does not say.", "zh": "条文没有提到。"}
