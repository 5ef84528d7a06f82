"""Chains as models write them: twenty anchored ones to keep, twenty not to keep with the check that must say so."""

from dataclasses import replace

from verl_avar.synthesis.checks import Context

TRIANGLE = Context(
    "In triangle ABC, AB = AC and the angle at A is 40°. Find angle ABC in degrees.",
    "70",
    description="A triangle ABC with apex A at the top. Sides AB and AC carry one tick mark each. The angle at A is "
    "labelled 40°. The base BC is horizontal, with B at the left and C at the right.",
)
CHORD = Context(
    "Find the length of chord AB.\nA. 6 cm\nB. 8 cm\nC. 10 cm\nD. 12 cm",
    "B",
    ("6 cm", "8 cm", "10 cm", "12 cm"),
    "A circle with centre O. A chord AB lies below the centre. A segment OM of length 3 meets the chord at a right "
    "angle in M. The radius OA is labelled 5 cm.",
)
BARS = Context(
    "How many more books were sold in March than in January?",
    "25",
    description="A bar chart titled 'Books sold'. The horizontal axis lists January, February, March and April. The "
    "bars reach 40, 55, 65 and 30 on the vertical axis. The bar of March is green, the others are blue.",
)
PIE = Context(
    "Which sector is the largest?",
    "Transport",
    ("Housing", "Food", "Transport", "Other"),
    "A pie chart of four sectors: Housing 28%, Food 22%, Transport 35% in orange, and Other 15%. A legend stands at "
    "the right.",
)
BALLS = Context(
    "Subtract all tiny shiny balls. How many objects are left?",
    "5",
    description="Seven objects on a grey floor: two tiny shiny balls (one purple, one gold), a large red matte cube, a "
    "small green cylinder, a large blue metal sphere, a small yellow cube and a brown cylinder at the back.",
)
CIRCUIT = Context(
    "Which bulb goes out when switch S2 is opened?",
    "B. bulb L2",
    ("bulb L1", "bulb L2", "both bulbs", "neither bulb"),
    "A circuit diagram with a battery at the left and two parallel branches. The upper branch has switch S1 and bulb "
    "L1, the lower branch has switch S2 and bulb L2.",
)
FOOD_WEB = Context(
    "Which organism is a producer?",
    "(C)",
    ("fox", "rabbit", "grass", "owl"),
    "A food web with arrows from grass to rabbit and grasshopper, from rabbit to fox and owl, and from grasshopper to "
    "the owl. Grass is at the bottom.",
)
STREET = Context(
    "What colour is the umbrella of the woman beside the bus?",
    "red",
    description="A rainy street. A woman in a grey coat holds a red umbrella beside a double-decker bus. Two men with "
    "black umbrellas wait at the traffic light. A sign over a shop reads BAKERY.",
)
SOLID = Context(
    "Find the volume of the cylinder.",
    "45\\pi",
    description="A right cylinder. The radius of its base is labelled 3 cm and its height 5 cm. A dashed ellipse marks "
    "the hidden edge of the base.",
)
PUZZLE = Context(
    "Which shape replaces the question mark?",
    "A",
    ("star", "circle", "square", "hexagon"),
    "A grid of three rows and three columns. Row 1 has a star, a circle and a square; row 2 a circle, a square and a "
    "star; row 3 a square, a question mark and a circle.",
)


def reply(thoughts: str, answer: str) -> str:
    return f"<think>{thoughts}</think>\n<answer>{answer}</answer>"


GOOD = {
    "triangle": (
        TRIANGLE,
        reply(
            "Okay, let me look at the figure first. I can see triangle ABC with A at the top, and both AB and AC "
            "carry a single tick mark, so the triangle is isosceles with AB = AC.\n\nThe angle at A is 40°, as "
            "marked. The other two angles must be equal, so each of them is (180° - 40°)/2 = 70°.\n\nWait, let me "
            "double-check. Looking at the triangle again, the tick marks are really on AB and AC, not on BC, so the "
            "base angles are those at B and C. The problem describes an isosceles triangle, which fits. So angle ABC "
            "= 70°.",
            "70",
        ),
    ),
    "triangle in LaTeX": (
        TRIANGLE,
        reply(
            "From the diagram, $AB = AC$ since both sides have one tick. Let $\\angle ABC = \\angle ACB = x$. Then "
            "$2x + 40^\\circ = 180^\\circ$, hence $2x = 140^\\circ$ and $x = 70^\\circ$.\n\nHmm, is the angle of 40° "
            "really at the apex? Let me check the image again. Yes: the label 40° sits right below A, between the two "
            "equal sides. Had it been at B, the result would be different: $\\angle ABC = 40^\\circ$. Since it is at "
            "A, the answer is $70^\\circ$.",
            "$70$",
        ),
    ),
    "chord by letter": (
        CHORD,
        reply(
            "I need the chord AB. In the figure, OM is perpendicular to AB and its length is 3, and the radius OA is "
            "5 cm.\n\nA perpendicular from the centre bisects the chord, so AM = MB. In the right triangle OMA: "
            "AM² = OA² - OM² = 25 - 9 = 16, so AM = 4 and AB = 8.\n\nBut wait, is OM drawn to the midpoint? Taking "
            "another look at the circle, M is the foot of the perpendicular on the chord, and a small square marks the "
            "right angle there. So the theorem applies. AB = 8 cm, which is option B.",
            "B",
        ),
    ),
    "chord by text": (
        CHORD,
        reply(
            "Looking closely at the circle, O is the centre, and the segment OM of length 3 drops to the chord AB. "
            "The right angle mark at M is clear. Half of the chord is sqrt(5^2 - 3^2) = sqrt(16) = 4.\n\nSo the full "
            "chord is 2 * 4 = 8 cm. Let me verify by going back to the figure: the label 5 cm stands on OA, the "
            "radius, and not on the chord. Good, the calculation is right. It agrees with the text of option B.",
            "B. 8 cm",
        ),
    ),
    "bars": (
        BARS,
        reply(
            "The chart shows books sold per month. I see the bar for January reaching 40, and the green bar of March "
            "is the tallest at 65.\n\nThe difference is 65 - 40 = 25.\n\nLet me make sure that I'm reading the bars "
            "correctly. Checking the vertical axis once more, the gridlines go in steps of 5, and the top of the "
            "March bar lines up with 65. January's bar stops exactly at 40. February is 55, which isn't needed here. "
            "So the difference is 25 books.",
            "25",
        ),
    ),
    "bars, with a corrected reading": (
        BARS,
        reply(
            "To answer this I need two heights. At first glance at the chart, March seems to be at 60. January is at "
            "40. That would give 20.\n\nHold on. Let me zoom in on the green bar: its top is above the line of 60, "
            "half-way to 70, so March is 65 instead. I should check January as well. I look at the first blue bar "
            "again and it ends on the line of 40.\n\nThen 65 - 40 = 25. My first reading was wrong, the corrected "
            "difference is 25.",
            "25",
        ),
    ),
    "pie by text": (
        PIE,
        reply(
            "I need the largest sector. In the pie chart, Transport is the orange sector with 35%, Housing has 28%, "
            "Food has 22% and Other has 15%. These add up to 100, so nothing is missing.\n\nComparing them: 35 > 28 > "
            "22 > 15. Let me look at the legend again to be sure that orange stands for Transport. Yes, the orange "
            "square is next to the word Transport. Visually, its sector is also the one that spans the widest angle. "
            "So Transport.",
            "Transport",
        ),
    ),
    "pie by letter": (
        PIE,
        reply(
            "The question asks for the largest sector. I notice four sectors: Housing 28%, Food 22%, Transport 35%, "
            "Other 15%. The text on the orange sector reads 35%.\n\nBefore I decide, could Housing be larger? 28 is "
            "less than 35. And the percentages sum to 100 as they should. Examining the chart once more, the orange "
            "sector takes more than a third of the circle, and no other sector comes near. The answer is Transport, "
            "option C.",
            "C",
        ),
    ),
    "counting": (
        BALLS,
        reply(
            "Let me look at the image carefully and list the objects. I count seven objects: a large red matte cube, "
            "a small green cylinder, a large blue metal sphere, a small yellow cube, a brown cylinder, and two tiny "
            "shiny balls.\n\nThe tiny shiny balls are the purple one and the gold one. Removing them leaves 7 - 2 = "
            "5.\n\nIs the blue sphere tiny as well? Looking back at the blue metal sphere, it is about as big as the "
            "red cube, so it is large and stays. So 5 objects are left.",
            "5",
        ),
    ),
    "counting, short sentences": (
        BALLS,
        reply(
            "Start with the picture. I see a red cube, a green cylinder, a blue sphere. There is a yellow cube. There "
            "is a brown cylinder at the back. Then two tiny balls, purple and gold.\n\nThat makes 3 + 1 + 1 + 2 = "
            "7.\n\nNow subtract. Both tiny balls are shiny. 7 - 2 = 5.\n\nWait. I should make sure nothing is hidden. "
            "Let me look again. Behind the blue sphere there is only the brown cylinder, which I counted. Nothing "
            "else is visible. So five remain.",
            "5",
        ),
    ),
    "circuit by text": (
        CIRCUIT,
        reply(
            "In the circuit diagram, the battery feeds two parallel branches. Looking at the lower branch, switch S2 "
            "is in series with bulb L2. The upper branch has S1 and L1.\n\nOpening S2 interrupts the lower branch "
            "only. Current still flows through the upper branch, as described by Kirchhoff's current law, so L1 stays "
            "lit.\n\nLet me retrace the diagram to be safe: from the battery the wire splits at a node, S2 comes "
            "first, then L2, then the branches join. No other path leads to L2. So L2 goes out.",
            "bulb L2",
        ),
    ),
    "circuit by letter": (
        CIRCUIT,
        reply(
            "Each bulb has its own switch here. I observe that S2 is placed in the lower branch together with L2, "
            "while S1 and L1 form the upper one. In a parallel circuit, each branch works on its own.\n\nIf S2 is "
            "opened, no current flows in the lower branch. Therefore L2 goes out. Could it affect L1? Let me "
            "re-examine the diagram: the upper branch connects directly to both poles of the battery, so L1 isn't "
            "affected. Options C and D are out. It is B.",
            "(B)",
        ),
    ),
    "food web": (
        FOOD_WEB,
        reply(
            "A producer makes its own food, so no arrow should point into it from another organism. Looking at the "
            "food web, the arrows start at the grass at the bottom and go to the rabbit and the grasshopper.\n\nThe "
            "rabbit eats grass, so it is a consumer. The fox and the owl are higher up. This matches the description "
            "of a producer in biology: a plant.\n\nLet me double-check the arrows in the image. None of them ends at "
            "the grass; two leave it. So the grass is the producer.",
            "C. grass",
        ),
    ),
    "food web, first person plural": (
        FOOD_WEB,
        reply(
            "We look for the organism at the base. In the food web we see arrows from grass to rabbit and to "
            "grasshopper. We also see the owl and the fox at the top, each with incoming arrows only.\n\nArrows "
            "follow the energy, so whatever feeds on grass points away from it. A fox can't be a producer, nor can an "
            "owl or a rabbit.\n\nTo verify, we go back to the image: grass is drawn at the bottom and no arrow enters "
            "it. Hence the producer is grass.",
            "grass",
        ),
    ),
    "street": (
        STREET,
        reply(
            "First I find the bus: I see a double-decker bus, and beside it stands a woman in a grey coat. She holds "
            "an umbrella. Its colour seems to be red.\n\nThere are other umbrellas too, so I must not mix them up. "
            "The two men at the traffic light have black ones, but the question is about the woman.\n\nLet me look at "
            "her once more: the grey coat, the bus behind her, and the umbrella above her head is red, clearly "
            "different from the black ones. I can't see the handle, but that doesn't matter.",
            "red",
        ),
    ),
    "street, with text in the image": (
        STREET,
        reply(
            "Scanning the image from left to right: a shop whose sign reads BAKERY, a traffic light with two men, and "
            "a double-decker bus. According to the text on the sign it is a bakery, which doesn't help here.\n\nThe "
            "woman beside the bus is the one in the grey coat. Her umbrella is red. Did I confuse her with someone "
            "else? Returning to the image, I find just one woman next to the bus, and the umbrella in her hand is "
            "red. The answer is red.",
            "Red",
        ),
    ),
    "solid": (
        SOLID,
        reply(
            "The volume of a cylinder is $V = \\pi r^2 h$. As shown in the figure, the radius of the base is 3 cm and "
            "the height is 5 cm. So $V = \\pi \\cdot 9 \\cdot 5 = 45\\pi$.\n\nLet me double check whether 3 is the "
            "radius or the diameter. Looking at the base again, the segment labelled 3 cm runs from the centre to the "
            "edge, so it is the radius. If it were the diameter, the volume would be $11.25\\pi$. I cannot see the "
            "hidden part of the base, but the dashed ellipse shows where it is. Hence $45\\pi$ cubic centimetres.",
            "$45\\pi$",
        ),
    ),
    "solid, written in a list": (
        SOLID,
        reply(
            "**Step 1: read the image.**\n- The image shows a right cylinder.\n- Radius of the base: 3 cm.\n- Height: "
            "5 cm.\n\n**Step 2: compute.**\n- Area of the base: 9π.\n- Volume: 9π · 5 = 45π.\n\n**Step 3: "
            "reflect.**\n- Is the height slanted? Inspecting the drawing again, the sides of the cylinder are "
            "vertical, so 5 cm is the height itself.\n- Is 3 cm a diameter? The mark goes from the centre to the "
            "edge, so it is not.\n\nThe volume is 45π.",
            "\\(45\\pi\\)",
        ),
    ),
    "puzzle": (
        PUZZLE,
        reply(
            "Each row seems to hold a star, a circle and a square. Let me look at the grid row by row. Row 1: star, "
            "circle, square. Row 2: circle, square, star. Row 3: square, ?, circle.\n\nSo row 3 lacks the star. Check "
            "by columns: column 2 has a circle, a square, and the missing one, so again a star.\n\nWait, is the last "
            "shape of row 3 a circle for sure? Glancing back at the third row, it is round with no corners, unlike "
            "the hexagon among the options. So the missing shape is the star, option A.",
            "A. star",
        ),
    ),
    "puzzle, with doubts": (
        PUZZLE,
        reply(
            "I see that the grid has three rows and three columns, with the question mark in row 3. Hmm, maybe shapes "
            "shift to the left in each row. Row 1 is star, circle, square. Shifting left gives circle, square, star: "
            "that is row 2. Shifting again gives square, star, circle.\n\nAlternatively, I could count the corners, "
            "but that pattern fails at once. On closer inspection of row 3, a square comes first and a circle last, "
            "which is what the shift predicts. So the question mark is the star.",
            "star",
        ),
    ),
}


def _good(name: str, old: str, new: str) -> tuple[Context, str]:
    """A good chain with one fault put in."""
    context, text = GOOD[name]
    assert old in text
    return context, text.replace(old, new)


_street, _street_text = GOOD["street"]
_solid, _solid_text = GOOD["solid"]
_bars, _bars_text = GOOD["bars"]
_calculation = (
    "Two sides are equal, so two angles are equal as well. Call each of them x. The angles of any triangle add up to "
    "180 degrees, which means 2x + 40 = 180. Subtracting 40 from both sides leaves 140. Half of 140 is 70. As a check, "
    "70 + 70 + 40 = 180, which is what the sum has to be. There is no other solution, because the equation is linear. "
)
BAD = {
    "according to the description": ("leak", *_good("triangle", "as marked", "according to the description")),
    "the description states": ("leak", *_good("bars", "The chart shows", "The description states the number of")),
    "left over once, late": ("leak", *_good("counting", "So 5 objects", "The image description lists no more. So 5")),
    "as described": ("leak", *_good("solid", "As shown in the figure", "As described")),
    "caption": ("leak", *_good("street", "Its colour seems", "Based on the caption, its colour seems")),
    "provided text": (
        "leak",
        *_good("pie by letter", "Before I decide", "The text provided says no more. Before I decide"),
    ),
    "sees no image": ("leak", *_good("puzzle", "So row 3 lacks", "I can't see the image itself, but row 3 lacks")),
    "no looks": ("no_anchors", TRIANGLE, reply(_calculation, "70")),
    "looks at the equation only": (
        "no_anchors",
        TRIANGLE,
        reply(_calculation + "Looking at the equation again, I see that I made no mistake in the calculation.", "70"),
    ),
    "one look": ("few_anchors", TRIANGLE, reply("In the figure, AB and AC have tick marks. " + _calculation, "70")),
    "all looks at the start": (
        "bunched_anchors",
        TRIANGLE,
        reply("In the figure, AB equals AC. I see the label 40° at A. " + _calculation + _calculation[:300], "70"),
    ),
    "all looks at the end": (
        "bunched_anchors",
        TRIANGLE,
        reply(_calculation + "Looking at the figure, A is the apex. I see the label 40° there.", "70"),
    ),
    "looks at things that are not there": (
        "ungrounded_anchors",
        replace(_street, description="Three penguins on an ice floe under a pale sun. One of them dives."),
        _street_text,
    ),
    "empty looks": (
        "ungrounded_anchors",
        TRIANGLE,
        reply("Let me look at the image. Okay. " + _calculation + "Let me look at the image again. Yes.", "70"),
    ),
    "another answer": ("wrong_answer", *_good("chord by text", "<answer>B. 8 cm", "<answer>C. 10 cm")),
    "another number": ("wrong_answer", *_good("bars", "<answer>25", "<answer>20")),
    "no think tags": ("format", _bars, _bars_text.replace("<think>", "").replace("</think>", "")),
    "refused": ("refusal", STREET, "I'm sorry, but I can't help with identifying the woman in this image. " * 3),
    "caught in a loop": (
        "repetition",
        *_good("street", "First I find", "Wait, let me look again. " * 30 + "First I find"),
    ),
    "cut down to a stub": (
        "length_ratio",
        replace(_solid, chain=_solid_text + _solid_text),
        reply(
            "In the figure the radius is 3 cm. The volume is 9π times 5. Looking again at the cylinder, its height is "
            "5 cm, so the volume is 45π.",
            "$45\\pi$",
        ),
    ),
}
