"""Questions about a licence, put together as people ask: [which licence it is about.] who may do what? [where that stands]

    asked whole    "Is there a warranty?"
    or composed    a frame, of whom, and of which act: "Does the text let {whom} {act}?"
    around it      an opening that names the licence, and an ending that wants the clause, each at times

Of each list, of whole questions, frames, people, acts, openings and endings, the last two are only asked, the one before them
is what the router is fitted to, and the rest is learned from (`splits.py:of_split`): no part of a question is on two sides.
What training calls to "sell copies" is in a suite to "run a paid service on it".
"""

# long: tables of wordings
from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TypeVar

from recipes.splits import of_split

SYSTEM = "You answer questions about licence texts, for a test."
T = TypeVar("T")
WHOLE_SHARE, OPENED_SHARE, ENDED_SHARE = 0.25, 0.3, 0.3  # of questions: asked whole, with an opening, with an ending

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
# Of a matter. `who`, `whom` and `my` are of the person; another "their" would leave open whose it is.
ACTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "en": {
        "change": (
            "change it", "modify the code", "alter the source", "make changes to it", "patch a file of it",
            "write a new version of it", "build something new on it", "translate it into another language",
            "improve the code", "fix a bug in it", "make a derivative work", "take parts out of the code",
            "rewrite a function", "extend the program", "customise it", "tweak the source", "develop it further",
        ),
        "sell": (
            "sell it", "take money for it", "sell copies", "ask a price for copies", "earn money with it",
            "make a profit from it", "use it commercially", "put it into a product that is sold", "use it in a business",
            "rent it out for a fee", "demand a fee for it", "sell a program that holds it",
            "offer it in a commercial product", "bring it to market for money", "get paid for it",
            "make customers pay for it", "run a paid service on it",
        ),
        "terms": (
            "put {my} changes under other terms", "sublicense it", "choose another licence",
            "give {my} version a licence of {my} own", "license {my} changes differently",
            "publish {my} part under a licence of {my} choice", "set other terms for {my} changes", "grant sublicenses",
            "release {my} version under new terms", "add terms of {my} own", "pass it on under a different licence",
            "swap the licence", "put a stricter licence on {my} version", "offer {my} additions under further conditions",
            "let {my} fork have a licence of another kind", "pick {my} own conditions for {my} work",
            "replace the licence of {my} version",
        ),
        "patents": (
            "use its patents", "get a patent licence", "make what the patents cover", "use a method that is patented",
            "sell what the patents cover", "use the patents of the contributors", "claim a licence to the patents",
            "work under the authors' patents", "use an invention that the authors patented",
            "build on a patented method of the authors",
            "have the patents for free", "import what the patents cover", "offer what a patent covers",
            "run the patented parts", "make use of patents that the authors hold",
            "apply the authors' patented technique", "exploit patents of the contributors",
        ),
        "notice": (
            "remove the notice", "leave out the copyright line", "delete the notices", "take the copyright notice away",
            "ship copies without the notice", "wipe out the copyright holders", "pass it on without the copyright notice",
            "take out the licence text", "omit the permission notice", "clean the files of copyright lines",
            "replace the copyright line by {my} own", "drop the licence file", "hand out copies that lack the notice",
            "leave the licence text out of copies", "do away with the copyright header",
            "scrub the copyright holders from the files", "distribute copies that lost the licence text",
        ),
        "blame": (
            "sue the authors for damages", "hold the authors liable", "claim damages", "make the authors pay for damage",
            "demand compensation from the authors", "take the authors to court over a bug",
            "get money from the authors if it fails", "claim a loss from the copyright holders",
            "blame the authors before a court", "make the authors responsible for damage", "seek damages for lost data",
            "have the authors answer for a failure", "sue whoever wrote it",
            "charge the damage to the authors", "bring a claim against the authors",
            "recover a loss from the developers", "go after the writers for harm",
        ),
        "warranty": (
            "rely on a warranty", "expect a warranty", "count on it to work", "expect it to be free of faults",
            "demand that it be fit for a purpose", "ask for a guarantee", "take it as guaranteed to run",
            "get a warranty for it", "rely on it being fit for use", "assume a warranty of quality",
            "demand repair under a warranty", "hold the authors to a warranty", "expect support by warranty",
            "expect merchantable quality", "treat it as tested and guaranteed", "insist that it runs without faults",
            "presume that it is guaranteed fit",
        ),
        "endorse": (
            "advertise with the authors' name", "use the authors' trademark", "say that the authors endorse {my} work",
            "promote {my} product with the authors' name", "put the authors' logo on {my} site",
            "name {my} product after that of the authors", "use the authors' trade name",
            "print the authors' name in an advert",
            "claim that the authors support {my} product", "call {my} fork by the authors' name",
            "use the authors' service mark", "show the authors' brand to customers",
            "let {my} advert mention the contributors", "tell customers that the authors recommend {my} product",
            "decorate {my} site with the authors' emblem", "market {my} product as approved by the authors",
            "borrow the authors' good name for {my} campaign",
        ),
        "unmarked": (
            "hide that it was changed", "leave {my} changes unmarked", "pass on changes without saying so",
            "pass {my} version off as the original", "keep changes secret in copies",
            "distribute modified files without a word", "be silent about {my} changes", "leave out what was changed",
            "give out a changed copy as if it were the original", "mix in {my} changes without a mark",
            "publish altered files without a hint", "tell nobody that it was modified",
            "ship a modified copy without a summary of changes", "pass on changes that nobody is told of",
            "present altered code as untouched", "disguise {my} version as that of the authors",
            "spread a modified copy without labelling it",
        ),
    },
    "zh": {
        "change": (
            "修改它", "改代码", "改动源码", "做修改", "给它打补丁", "写一个新版本", "在它上面开发", "把它改成别的语言",
            "改进代码", "修复里面的错误", "做衍生作品", "摘取部分代码", "重写一个函数", "扩展程序", "定制它", "微调源码",
            "进一步开发它",
        ),
        "sell": (
            "卖它", "收费", "出售副本", "给副本定价", "用它赚钱", "靠它盈利", "用于商业", "放进出售的产品", "在生意里用它",
            "出租它收钱", "收取费用", "卖含有它的程序", "放进商业产品", "拿到市场上卖", "用它换钱", "让顾客付钱",
            "靠它做收费服务",
        ),
        "terms": (
            "给自己的修改用别的条款", "再许可", "选别的许可证", "给自己的版本定许可证", "用不同的许可发布修改",
            "按自己选的许可证发布", "给修改另定条款", "授予再许可", "用新条款发布自己的版本", "加上自己的条款",
            "换一种许可证传给别人", "改用别的许可证", "给自己的版本用更严的许可证", "给新增部分附加条件",
            "让分支用另一类许可证", "给自己的作品定条件", "替换自己版本的许可证",
        ),
        "patents": (
            "用它的专利", "得到专利许可", "制造专利涵盖的东西", "使用有专利的方法", "出售专利涵盖的东西", "用贡献者的专利",
            "要求专利授权", "在作者的专利下工作", "用作者的专利发明", "依照专利方法开发", "免费用专利", "进口专利产品",
            "提供专利涵盖的服务", "运行有专利的部分", "利用作者的专利", "应用作者的专利技术", "使用贡献者持有的专利",
        ),
        "notice": (
            "删掉声明", "去掉版权行", "删除版权声明", "拿走版权说明", "不带声明传播副本", "抹去版权人的名字",
            "传播时不附版权声明", "拿掉许可证全文", "略去许可声明", "清除文件里的版权行", "用自己的名字换掉版权行",
            "丢掉许可证文件", "发没有声明的副本", "副本里不放许可证全文", "除去版权头", "把版权人从文件里清掉",
            "分发不含许可证全文的副本",
        ),
        "blame": (
            "向作者索赔", "让作者负责", "要求赔偿", "让作者赔钱", "向作者要补偿", "为错误起诉作者", "出故障时向作者要钱",
            "向版权人索要损失", "在法庭上告作者", "让作者承担损害", "为丢失的数据索赔", "要作者对故障负责", "起诉写它的人",
            "把损失算到作者头上", "对作者提出诉求", "从开发者那里讨回损失", "为损害找编写者算账",
        ),
        "warranty": (
            "依靠担保", "期待有担保", "指望它能运行", "期待它没有缺陷", "要求它适合用途", "要求保证质量", "当它保证能运行",
            "得到担保", "相信它适合使用", "认定质量有担保", "按担保要求修理", "要作者履行担保", "按担保得到支持",
            "要求没有缺陷的保证", "当作经过检验的产品", "坚持要它毫无毛病", "认为它肯定适用",
        ),
        "endorse": (
            "用作者的名字做广告", "用作者的商标", "说作者支持自己", "用作者的名字推销产品", "把作者的标志放到网站",
            "用作者的名字命名产品", "用作者的商号", "在广告上印作者的名字", "声称作者支持产品", "用作者的名字称呼分支",
            "用作者的服务标志", "向顾客展示作者的品牌", "在广告里提到贡献者", "告诉顾客作者推荐产品", "用作者的徽章装饰网站",
            "把产品说成作者认可的", "借作者的名声做宣传",
        ),
        "unmarked": (
            "隐瞒自己的修改", "修改后不标明", "不说明就传播修改", "把自己的版本说成原版", "在副本里对修改保密",
            "一声不响地发布改过的文件", "不交代改动", "略去改了什么", "把改过的副本当原版发", "混入修改而不标注",
            "发布改过的文件而不提示", "不告诉别人它被改过", "不附修改摘要就发副本", "传播没人知道的修改",
            "让改过的代码看上去没动过", "把自己的版本伪装成原作者的", "传播改过的副本而不加标记",
        ),
    },
}  # fmt: skip
FRAMES: Mapping[str, tuple[str, ...]] = {
    "en": (
        "May {who} {act}?", "Can {who} {act}?", "Is it permitted that {who} {act}?", "Does the text let {whom} {act}?",
        "Is it fine for {whom} to {act}?", "Does this allow {whom} to {act}?", "What follows, should {who} {act}?",
        "Is it forbidden for {whom} to {act}?", "To {act}: is that open to {whom}?", "Tell me whether {who} can {act}.",
        "Please say whether {who} may {act}.", "Is there a rule against it, should {who} {act}?",
        "Does anything here forbid {whom} to {act}?", "Is it true that {who} may {act}?", "Could {who} {act}?",
        "Will it be all right for {whom} to {act}?", "Do the clauses stand in the way, should {who} {act}?",
    ),
    "zh": (
        "{who}可以{act}吗？", "{who}能{act}吗？", "允许{who}{act}吗？", "{who}{act}行吗？", "请问{who}是否可以{act}？",
        "条文让{who}{act}吗？", "{who}想{act}，可以吗？", "{who}要是{act}，合规吗？", "是否禁止{who}{act}？",
        "这里准许{who}{act}吗？", "我想知道{who}能不能{act}。", "{who}有没有权{act}？", "对{who}来说，{act}合法吗？",
        "{who}打算{act}，有问题吗？", "{who}可不可以{act}？", "假如{who}{act}，文本同意吗？", "{who}被许可{act}吗？",
    ),
}  # fmt: skip
PEOPLE: Mapping[str, tuple[tuple[str, str, str], ...]] = {  # who, whom, my
    "en": (
        ("I", "me", "my"), ("we", "us", "our"), ("my company", "my company", "its"), ("a student", "a student", "their"),
        ("anyone", "anyone", "their"), ("our team", "our team", "its"), ("my client", "my client", "their"),
        ("a school", "a school", "its"), ("users", "users", "their"), ("a developer", "a developer", "their"),
        ("a museum", "a museum", "its"), ("my neighbour", "my neighbour", "their"), ("a hospital", "a hospital", "its"),
    ),
    "zh": tuple(
        (who, who, "自己的")
        for who in (
            "我", "我们", "我的公司", "学生", "任何人", "我们的团队", "我的客户", "学校", "用户", "开发者", "博物馆",
            "我的邻居", "医院",
        )
    ),
}  # fmt: skip
LICENCE = {"en": "the {} licence", "zh": "{}"}  # as it is named
OPENINGS: Mapping[str, tuple[str, ...]] = {
    "en": (
        "Here are clauses of {licence}. ", "The library is under {licence}. ", "This is from {licence}. ",
        "We use code under {licence}. ", "I have read {licence}. ", "My question is about {licence}. ",
        "The package says {licence}. ", "A tool of ours has {licence}. ", "The repository is under {licence}. ",
        "A program that I found has {licence}. ", "Suppose that {licence} applies. ",
    ),
    "zh": (
        "这是{licence}的原文。", "这个库用{licence}。", "以下出自{licence}。", "我们用的代码是{licence}的。",
        "我读了{licence}。", "我问的是{licence}。", "这个包写着{licence}。", "我们的工具用{licence}。",
        "这个仓库用{licence}。", "我找到的程序用{licence}。", "假设适用{licence}。",
    ),
}  # fmt: skip
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "en": (
        " Quote the clause.", " Which words say so?", " Please cite the text.", " Show me the line.",
        " Where does it say that?", " Give me the exact words.", " Cite it word for word.", " Point to the clause, please.",
        " Copy the sentence that says so.", " How is it worded?", " I need the passage.",
    ),
    "zh": (
        "请引原文。", "哪句话说的？", "请给出原句。", "指给我看那一行。", "在哪里写着？", "我要原话。", "逐字引用。",
        "请指出那一句。", "抄下那句话。", "原文怎么写？", "我需要那一段。",
    ),
}  # fmt: skip
PERMITTED = {"en": "Permitted", "zh": "允许"}
FORBIDDEN = {"en": "Not permitted", "zh": "不允许"}
SILENT = {"en": "The text does not say.", "zh": "条文没有提到。"}


def question(language: str, matter: str, wordings: str, licence: str, draws: random.Random) -> str:
    """A question on a matter under a licence, of the wordings of a split."""

    def one(some: Sequence[T]) -> T:
        return draws.choice(of_split(some, wordings))

    if draws.random() < WHOLE_SHARE:
        core = one(ASKED[language][matter])
    else:
        core = composed(one(FRAMES[language]), one(PEOPLE[language]), one(ACTS[language][matter]))
    named = LICENCE[language].format(licence)
    opening = one(OPENINGS[language]).format(licence=named) if draws.random() < OPENED_SHARE else ""
    return opening + core + (one(ENDINGS[language]) if draws.random() < ENDED_SHARE else "")


def composed(frame: str, person: tuple[str, str, str], act: str) -> str:
    """A frame with a person and an act in it."""
    who = dict(zip(("who", "whom", "my"), person, strict=True))
    return frame.format(act=act.format(**who), **who)


def cores(language: str, matter: str, wordings: str) -> Iterator[str]:
    """All questions on a matter of the wordings of a split, without opening and ending."""
    yield from of_split(ASKED[language][matter], wordings)
    frames, people = of_split(FRAMES[language], wordings), of_split(PEOPLE[language], wordings)
    for frame, person, act in product(frames, people, of_split(ACTS[language][matter], wordings)):
        yield composed(frame, person, act)
