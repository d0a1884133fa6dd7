"""The page in a real browser, on a real server: what a person sees and hears, by mouse, by keyboard and on a phone."""

import shutil
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'bertforge[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

QUESTION = {"Title": "What is the best laptop for a student?", "BodyMarkdown": "Which one 💻 should I buy? Thanks!"}
HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script> & ' + "x" * 500


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, server):
    """Opens the page as on some device. On leaving, the browser's console has only what is `expected`."""

    @contextmanager
    def open_page(key=server.key, expected="", **device):
        context = browser.new_context(**device)
        page, said = context.new_page(), []
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(f"{message.location['url']} {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.address)
        sync_api.expect(page.get_by_role("alert")).to_contain_text("needs an API key")  # nobody has typed one yet
        assert page.inner_text("header") == "Ask the model"
        said.clear()
        if key:
            page.get_by_label("Key", exact=True).fill(key)
            page.keyboard.press("Tab")
            sync_api.expect(page.get_by_label("Title", exact=True)).to_be_visible()
        yield page
        assert [text for text in said if not expected or expected not in text] == []
        context.close()

    return open_page


def ask(page, row=QUESTION):
    """Types a row, asks, and waits until the words are shown or an error is."""
    for name, value in row.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_role("button", name="Ask the model").click()
    page.wait_for_selector("#why:visible, #error:visible")


def overflow(page):
    """How many pixels one must scroll sideways."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_a_person_sees_what_the_api_answers(opened, server):
    row = QUESTION | {"Tag1": "hardware", "ReputationAtPostCreation": "3"}
    with opened() as page:
        ask(page, row)
        every = {label.get_attribute("data-column"): "" for label in page.locator("[data-column]").all()}
        answer = server.classify(every | row).json()["results"][0]
        share = round(100 * answer["probability"])
        assert 50 < share < 99
        assert page.locator("#verdict").inner_text() == f"{answer['label']}, {share}%"
        assert f"Of 100 texts that get this number, about {share} are “{answer['label']}”" in page.inner_text(
            "#meaning"
        )
        assert page.locator("#labels li").count() == 2
        reasons = server.http.post("/v1/explain", json={"inputs": every | row}).json()
        why = f"By your thresholds, “{answer['label']}” never counts."
        assert page.inner_text("#decision") == f"Decision: send to a person. {why}"
        strongest = max(reasons["words"], key=lambda word: abs(word["push"]))
        assert f"“{strongest['text']}”" in page.inner_text("#pushes")
        marked = page.locator("#read :is(.for, .against)").all_inner_texts()
        assert set() < set(marked) <= {word["text"] for word in reasons["words"]}
        shown = " ".join(page.locator("#read").inner_text().split())
        assert shown == " ".join(f"{name} {text}" for name, text in QUESTION.items())
        assert page.locator("#mistake-list p").all_inner_texts() == [one["text"] for one in reasons["mistakes"]] != []


def test_it_tells_whether_what_comes_in_is_like_training(opened, server):
    server.classify("one text", model="plain")
    with opened() as page:
        page.get_by_label("Model", exact=True).select_option("plain")
        sync_api.expect(page.locator("#monitor-state")).to_contain_text("so far; too few to compare")
        assert page.locator("#monitor-table").is_hidden()
    rows = [QUESTION | dict.fromkeys(server.http.get("/v1/models").json()["models"][0]["columns"], "")]
    server.classify(rows * server.http.get("/v1/monitor").json()["fewest"])
    with opened() as page:
        ask(page)
        page.wait_for_selector("#monitor-rows tr")
        told = server.http.get("/v1/monitor").json()
        assert f"last {told['rows']} texts" in page.inner_text("#monitor-state")
        shown = page.locator("#monitor-rows th").all_inner_texts()
        assert shown == list(told["quantities"])
        rows = dict(zip(shown, page.locator("#monitor-rows tr").all_inner_texts(), strict=True))
        for name, quantity in told["quantities"].items():
            assert ("as in training" in rows[name]) == (quantity["drift"] == "none")


def test_it_says_why_the_decision_is_another_label(opened, server):
    """A threshold of one label that is out of reach leaves the row to the other one, as `Policy` has it."""

    def changed(route):
        told = route.fetch().json()
        if "models" in told:
            told["models"][0]["thresholds"] = {"open": 0.834, "closed": 0.834}
        else:
            (result,) = told["results"]
            result["decision"] = {"open": "closed", "closed": "open"}[result["label"]]
        route.fulfill(json=told)

    with opened(key=None) as page:
        page.route("**/v1/models", changed)
        page.route("**/v1/classify", changed)
        page.get_by_label("Key", exact=True).fill(server.key)
        page.keyboard.press("Tab")
        ask(page)
        label = page.inner_text("#verdict").partition(",")[0]
        other = {"open": "closed", "closed": "open"}[label]
        expected = f"Decision: {other}. By your thresholds, “{label}” counts from 83.4%."
        assert page.inner_text("#decision") == expected


def test_it_works_by_keyboard_alone_and_focus_goes_to_what_is_new(opened, server):
    def focused():
        return page.evaluate("document.activeElement.id")

    with opened(key=None) as page:
        assert focused() == "key"  # what is missing
        page.keyboard.type(server.key)
        page.keyboard.press("Enter")
        sync_api.expect(page.get_by_label("Title", exact=True)).to_be_focused()
        for name, text in QUESTION.items():
            assert focused() == f"field-{name}"
            page.keyboard.type(text)
            page.keyboard.press("Tab")
        while focused() != "ask":
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#why:visible")
        assert focused() == "verdict"
        assert page.get_by_role("status").inner_text() == "What pushed the answer is shown below it."
        page.keyboard.press("Tab")
        assert focused() == "read"  # it may scroll
        page.get_by_label("Title", exact=True).focus()
        page.keyboard.press("Control+Enter")
        sync_api.expect(page.locator("#verdict")).to_be_focused()


def test_on_a_phone_nothing_is_wider_than_the_screen(opened):
    with opened(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True) as page:
        assert overflow(page) == 0
        ask(page, QUESTION | {"BodyMarkdown": HOSTILE})
        assert overflow(page) == 0
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('pre'), {textContent: 'x'.repeat(99)}))"
        )
        assert overflow(page) > 0  # it would be seen


def test_a_hostile_text_stays_a_text(opened):
    with opened() as page:
        ask(page, dict.fromkeys(QUESTION, HOSTILE) | {"Tag1": HOSTILE})
        assert HOSTILE.split("x" * 500)[0].strip() in page.inner_text("#read")
        assert page.locator("img, main script").count() == 0
        assert page.evaluate("window.hacked") is None


def test_the_policy_stops_a_script_that_got_in(opened):
    with opened(expected="Content Security Policy") as page:
        page.evaluate(f"document.body.append(document.createRange().createContextualFragment({HOSTILE!r}))")
        page.wait_for_timeout(200)  # as long as a picture takes that is not there
        assert page.evaluate("window.hacked") is None


def test_axe_finds_nothing_wrong_in_light_and_dark_before_and_after_an_answer(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def wrong(scheme):
        page.emulate_media(color_scheme=scheme)
        found = axe.run(page)
        return found.generate_report() if found.violations_count else ""

    with opened() as page:
        assert wrong("light") == ""
        assert wrong("dark") == ""
        ask(page, QUESTION | {"BodyMarkdown": "Which one should I buy? " * 60, "Tag1": "hardware"})
        assert wrong("dark") == ""
        assert wrong("light") == ""
        page.locator("#read").evaluate("element => element.style.color = 'silver'")
        assert "contrast" in wrong("light")  # it would be seen


def test_no_text_is_asked_for_in_plain_words(opened):
    with opened() as page:
        ask(page, {"Title": " "})
        assert page.get_by_role("alert").inner_text() == "There is no text yet. Type or paste one."
        assert page.evaluate("document.activeElement.id") == "field-Title"
        assert page.get_by_label("Title", exact=True).get_attribute("aria-invalid") == "true"
        ask(page)
        assert page.get_by_role("alert").count() == 0  # it is gone when it is answered
        assert page.get_by_label("Title", exact=True).get_attribute("aria-invalid") is None


def test_a_text_that_is_too_long_and_a_wrong_key_are_told_from_one_another(opened):
    with opened(expected="Failed to load resource") as page:
        ask(page, QUESTION | {"BodyMarkdown": "x" * 100_001})
        assert "100,000" in page.get_by_role("alert").inner_text()
        assert page.get_by_label("BodyMarkdown", exact=True).get_attribute("aria-invalid") == "true"
        page.get_by_label("Key", exact=True).fill("wrong")
        ask(page)
        assert "does not know this API key" in page.get_by_role("alert").inner_text()
        assert page.evaluate("document.activeElement.id") == "key"


def test_refusals_are_told_in_plain_words(opened):
    said = {429: "Try again in 7 seconds", 503: "starting again", 504: "too long", 500: "could not answer (500)"}
    error = {"error": {"code": "of_the_test", "message": "no", "field": None}, "id": "1"}

    def refuse(status):
        return lambda route: route.fulfill(status=status, headers={"Retry-After": "7"}, json=error)

    with opened(expected="Failed to load resource") as page:
        for status, words in said.items():
            page.route("**/v1/classify", refuse(status))
            ask(page)
            assert words in page.get_by_role("alert").inner_text()
            assert page.locator("#answer").is_hidden()
        page.route("**/v1/classify", lambda route: route.abort())
        ask(page)
        assert "does not answer" in page.get_by_role("alert").inner_text()


def test_the_key_is_kept_nowhere(opened, server):
    with opened(expected="401") as page:
        ask(page)
        kept = page.evaluate("JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}, location.href])")
        assert server.key not in kept
        page.reload()
        assert page.get_by_label("Key", exact=True).input_value() == ""
        sync_api.expect(page.get_by_role("alert")).to_contain_text("API key")


def test_who_wants_no_motion_gets_none(opened):
    with opened() as page:
        for motion, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
            page.emulate_media(reduced_motion=motion)
            assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behaviour


def test_another_model_has_fields_of_its_own_and_keeps_what_was_typed(opened):
    with opened() as page:
        page.get_by_label("Title", exact=True).fill("kept")
        assert page.get_by_role("group", name="beside the text").count() == 1
        page.get_by_label("Model", exact=True).select_option("plain")
        assert page.get_by_role("group", name="beside the text").count() == 0
        assert page.get_by_label("Title", exact=True).input_value() == "kept"
        ask(page)
        assert "Model plain" in page.inner_text("#origin")
        assert page.locator("#decision").is_hidden()  # it has no thresholds


def test_another_model_ends_the_answer_under_way_and_shows_what_it_is_asked_itself(opened):
    with opened() as page:
        held = []
        page.route("**/v1/explain", lambda route: held.append(route))
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.get_by_label("Title", exact=True).fill(QUESTION["Title"])
        page.get_by_role("button", name="Ask the model").click()
        sync_api.expect(page.locator("#verdict")).not_to_be_empty()
        page.get_by_label("Model", exact=True).select_option("plain")
        sync_api.expect(page.locator("#progress")).to_be_empty()
        page.wait_for_function("!document.getElementById('monitor').hidden")
        assert any(url.endswith("v1/monitor?model=plain") for url in asked)
        assert page.locator("#answer").is_hidden()
        assert len(held) == 1
