// Mends what Gradio's own markup gets wrong for screen readers, as it appears on the page.
(() => {
  const mend = () => {
    // a box for messages whose label is a span beside it, or only its placeholder
    document.querySelectorAll('.multimodal-textbox textarea:not([aria-label])').forEach((box) => {
      const label = box.closest('.multimodal-textbox').querySelector('[data-testid="block-info"]');
      if (label) box.setAttribute('aria-label', label.textContent.trim());
    });
    // a list whose children are buttons and no items
    document.querySelectorAll('.examples[role="list"]').forEach((list) => list.setAttribute('role', 'group'));
  };
  new MutationObserver(mend).observe(document.documentElement, { childList: true, subtree: true });
})();
