// Mends what Gradio's own markup gets wrong for screen readers, as it appears on the page.
(() => {
  const mend = () => {
    // a box for messages whose label is a span beside it, or only its placeholder
    document.querySelectorAll('.multimodal-textbox textarea:not([aria-label])').forEach((box) => {
      const label = box.closest('.multimodal-textbox').querySelector('[data-testid="block-info"]');
      if (label) box.setAttribute('aria-label', label.textContent.trim());
    });
    // a button whose words on the screen are not its name
    document.querySelectorAll('.submit-button[aria-label], .stop-button[aria-label]').forEach((button) => {
      if (button.textContent.trim()) button.removeAttribute('aria-label');
    });
    // radios of one question that the browser takes for several questions: arrow keys would not move between them
    document.querySelectorAll('fieldset').forEach((question) => {
      const [first, ...others] = question.querySelectorAll('input[type="radio"]');
      others.forEach((radio) => { if (radio.name !== first.name) radio.name = first.name; });
    });
    // messages named by all of their own markup: who speaks is enough, the words follow
    document.querySelectorAll('#chat [data-testid="bot"][aria-label], #chat [data-testid="user"][aria-label]').forEach((said) => {
      const [who, ...words] = said.getAttribute('aria-label').split(':');
      if (!words.length) return;
      said.setAttribute('role', 'group');
      said.setAttribute('aria-label', who);
    });
    // a list whose children are buttons and no items
    document.querySelectorAll('.examples[role="list"]').forEach((list) => list.setAttribute('role', 'group'));
  };
  new MutationObserver(mend).observe(document.documentElement, { childList: true, subtree: true });
})();
