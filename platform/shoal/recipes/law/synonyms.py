"""Other words for those of the questions that are learned from, as `shoal augment --synonyms` takes them, in English and
Chinese. None is, or has, a question that is asked or fitted to (a test holds that)."""

from __future__ import annotations

from collections.abc import Mapping

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "may i": ("am I free to", "is it all right to", "do I have leave to"), "can i": ("am I able to", "do I get to"),
    "am i allowed to": ("am I entitled to", "have I the right to"), "change it": ("alter it", "amend it"),
    "modify the code": ("alter the source", "patch the source"), "sell it": ("trade it", "market it"),
    "take money for it": ("ask a price for it", "earn from it"), "sell copies": ("market duplicates", "trade duplicates"),
    "other terms": ("different conditions", "conditions of mine"), "sublicense it": ("pass it on under my licence",),
    "choose another licence": ("pick a different licence", "switch the licence"), "patents": ("patented inventions",),
    "a patent licence": ("rights to the patented inventions",), "remove the notice": ("erase the notice",),
    "leave out the copyright line": ("omit the copyright header",), "delete the notices": ("erase the notices",),
    "sue the authors": ("take the authors to court",), "liable": ("answerable", "legally bound"),
    "claim damages": ("demand money for harm done", "seek redress"), "a warranty": ("an assurance", "any assurance"),
    "rely on": ("trust in",), "warrant that it works": ("assure me that it runs",),
    "advertise with": ("run adverts with",), "use their trademark": ("carry their mark",),
    "use the authors' trademark": ("carry the authors' mark",),
    "endorse me": ("recommend me", "back me"), "hide that i changed it": ("keep my alterations secret",),
    "leave my changes unmarked": ("flag none of my alterations",),
    "pass on changes without saying so": ("hand on alterations in silence",),
    "修改它": ("变更它", "对它做变动"), "改代码": ("变动代码", "更改代码"), "卖它": ("贩卖它", "售卖它"), "收费": ("收钱",),
    "出售副本": ("售卖副本", "贩卖副本"), "别的条款": ("另外的条款", "不同的条款"), "再许可": ("转授许可",),
    "别的许可证": ("另一个许可证", "其他许可证"), "用它的专利": ("使用其专利",), "专利许可": ("专利授权",),
    "删掉声明": ("删去声明",), "去掉版权行": ("删去版权行",), "删除版权声明": ("删去版权声明",),
    "向作者索赔": ("向作者要求赔款",), "要求赔偿": ("索要赔款",), "作者要负责": ("作者须承担责任",),
    "担保": ("保障", "担保责任"), "做广告": ("打广告", "登广告"), "支持我": ("为我背书",), "隐瞒": ("瞒下", "不透露"),
    "不标明": ("不加标示", "不注明"), "不说明": ("不作说明",),
}  # fmt: skip
