"""What was sorted out by eye for the bundled data: which things are kept, and what they are called."""

from __future__ import annotations

SUBCATEGORIES = {
    "animal": ("animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug"),
    "plant": ("plant-flower", "plant-other"),
    "food": ("food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet", "drink", "dishware"),
    "activity": ("sport", "game", "arts & crafts", "award-medal", "event", "musical-instrument", "music"),
    "travel": (
        "transport-ground",
        "transport-water",
        "transport-air",
        "place-geographic",
        "place-building",
        "place-other",
    ),
    "sky": ("sky & weather",),
    "object": (
        "tool",
        "household",
        "clothing",
        "light & video",
        "science",
        "computer",
        "medical",
        "phone",
        "lock",
        "writing",
    ),
    "being": ("face-costume",),
}
"""Category of the data set -> sub-categories of the emoji tables."""


# Near-duplicates of a kept picture, composites, symbols and names that do not say what is drawn.
DROPPED = """
pig nose|service dog|guide dog|black cat|two-hump camel|front-facing baby chick|hatching chick|black bird|
spouting whale|ewe|ox|water buffalo|microbe|worm|fly|cricket|nest with eggs|empty nest|leafless tree|shamrock|
white flower|wilted flower|rosette|bouquet|herb|sheaf of rice|deciduous tree|blossom|brown mushroom|root vegetable|
pea pod|lime|meat on bone|cut of meat|pot of food|cooking|stuffed flatbread|flatbread|bowl with spoon|canned food|
tamale|fondue|rice cracker|oden|dango|moon cake|steaming bowl|curry rice|takeout box|ice cream|shaved ice|custard|
teacup without handle|clinking beer mugs|clinking glasses|beverage box|mate|ice|pouring liquid|tropical drink|
tumbler glass|sake|amphora|running shirt|diving mask|goal net|martial arts uniform|flag in hole|field hockey|
cricket game|lacrosse|softball|rugby football|mahjong red dragon|flower playing cards|spade suit|club suit|heart suit|
diamond suit|mirror ball|performing arts|knot|2nd place medal|3rd place medal|1st place medal|military medal|sparkler|
confetti ball|tanabata tree|pine decoration|japanese dolls|moon viewing ceremony|reminder ribbon|admission tickets|
red envelope|sparkles|long drum|level slider|control knobs|studio microphone|musical notes|musical score|carp streamer|
wind chime|locomotive|railway car|high-speed train|train|light rail|station|tram car|bus stop|minibus|trolleybus|
articulated lorry|mountain railway|vertical traffic light|motorway|railway track|monorail|motorized wheelchair|
motor scooter|motor boat|passenger ship|seat|suspension railway|mountain cableway|small airplane|airplane departure|
airplane arrival|beach with umbrella|camping|national park|mountain|desert island|mount fuji|building construction|
houses|derelict house|house with garden|office building|japanese post office|post office|bank|hotel|love hotel|
convenience store|school|department store|japanese castle|wedding|tokyo tower|foggy|night with stars|
sunrise over mountains|sunrise|cityscape at dusk|sunset|bridge at night|cityscape|hot springs|cyclone|closed umbrella|
milky way|new moon|waxing crescent moon|first quarter moon|waxing gibbous moon|full moon|waning gibbous moon|
last quarter moon|waning crescent moon|glowing star|cloud with rain|cloud with snow|fog|snowman without snow|
sun behind cloud|umbrella on ground|hammer and wrench|hammer and pick|pick|broken chain|white cane|nut and bolt|
couch and lamp|lotion bottle|roll of paper|bubbles|shower|woman's hat|woman's clothes|woman's sandal|woman's boot|
man's shoe|clutch bag|thong sandal|one-piece swimsuit|safety vest|lab coat|hair pick|prayer beads|shopping bags|
rescue worker's helmet|flat shoe|briefs|military helmet|film frames|camera with flash|video camera|videocassette|
film projector|diya lamp|dvd|optical disk|low battery|trackball|keyboard|computer disk|fax machine|locked with pen|
locked with key|unlocked|old key|memo|pen|black nib|petri dish|alembic|drop of blood|x-ray|adhesive bandage|ogre|
goblin|alien monster|horizontal traffic light|cloud with lightning|oil drum|mouse trap|pile of poo|link|
telephone receiver
"""


RENAMED = {
    "magnifying glass tilted left": "magnifying glass",
    "globe with meridians": "globe",
    "soft ice cream": "ice cream",
    "pool 8 ball": "billiard ball",
    "lady beetle": "ladybug",
    "ear of corn": "corn",
    "closed book": "book",
    "cup with straw": "soda cup",
    "police car light": "siren",
    "glass of milk": "milk",
    "snow-capped mountain": "mountain",
    "roasted sweet potato": "sweet potato",
    "high voltage": "lightning",
    "sport utility vehicle": "suv",
    "locked": "padlock",
    "automobile": "car",
    "construction": "construction barrier",
}


# Uninhabited places, unions, and dependent territories with flags that look alike at 64 pixels.
DROPPED_TERRITORIES = """
AC AI AQ AS AX BL BQ BV CC CP CQ CX DG EA EH EU FK GF GG GP GS HM IC IM IO JE MF MP MQ MS
NC NF NU PM PN RE SH SJ TA TC TF TK UM UN VG VI WF YT
"""


COUNTRY_NAMES = {
    "AG": "antigua",
    "BA": "bosnia",
    "CD": "congo kinshasa",
    "CG": "congo brazzaville",
    "CI": "ivory coast",
    "HK": "hong kong",
    "KN": "saint kitts",
    "LC": "saint lucia",
    "MM": "myanmar",
    "MO": "macao",
    "PS": "palestine",
    "ST": "sao tome",
    "TL": "east timor",
    "TT": "trinidad",
    "VC": "saint vincent",
}


# English names that are too long for a small vocabulary.
CURRENCY_NAMES = {
    "AED": "emirati dirham",
    "BAM": "convertible mark",
    "PGK": "kina",
    "STN": "dobra",
    "TTD": "trinidad dollar",
}


# Countries for which CLDR's first current legal tender is not the main currency.
MAIN_CURRENCY = {"LS": "LSL"}
