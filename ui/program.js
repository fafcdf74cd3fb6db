// Run below a block of Python in an answer. What it printed is shown as text below it, whatever Gradio makes anew of the conversation:
// it is kept here by the program, until the page is left.
window.program = (() => {
  const BLOCK = '.message.bot pre > code.language-python, .bot pre > code.language-python';
  const results = new Map(); // program -> what came out
  let waiting; // the program that runs

  const set = (element, name, value) => { if (element.getAttribute(name) !== value) element.setAttribute(name, value); };
  const write = (element, text) => { if (element.textContent !== text) element.textContent = text; };
  const textOf = (code) => code.textContent.replace(/\n$/, '');

  const boxOf = (code) => {
    const block = code.closest('.code_wrap') ?? code.parentElement;
    const next = block.nextElementSibling;
    if (next?.classList.contains('program')) return next;
    const box = document.createElement('div');
    box.className = 'program';
    box.innerHTML = '<button type="button">Run</button><pre class="out" role="status" aria-label="What it printed"></pre><pre class="fault"></pre>';
    box.querySelector('button').addEventListener('click', () => {
      if (waiting !== undefined) return;
      waiting = textOf(code);
      document.querySelector('#start-program').click();
      draw();
    });
    block.after(box);
    return box;
  };

  const draw = () => {
    if (!document.querySelector('#runs .runs')) return;
    const boxes = new Set();
    document.querySelectorAll(BLOCK).forEach((code) => {
      const box = boxOf(code);
      boxes.add(box);
      const text = textOf(code);
      const { out = '', fault = '', done = false } = results.get(text) ?? {};
      const button = box.querySelector('button');
      write(button, waiting === text ? 'Running…' : 'Run');
      set(button, 'aria-disabled', String(waiting !== undefined));
      const printed = box.querySelector('.out');
      write(printed, done && !out && !fault ? '(it printed nothing)' : out);
      write(box.querySelector('.fault'), fault);
    });
    // of blocks that Gradio made anew as their answer came
    document.querySelectorAll('.program').forEach((box) => { if (!boxes.has(box)) box.remove(); });
  };

  const end = (result) => {
    if (waiting === undefined) return;
    results.set(waiting, { ...result, done: true });
    waiting = undefined;
    draw();
  };

  // --- what Gradio calls

  const next = () => waiting;
  const told = (reply) => { end(JSON.parse(reply)); };
  const lost = () => { end({ fault: 'It could not be run. Try it again.' }); };

  new MutationObserver(draw).observe(document.documentElement, { childList: true, subtree: true });
  return { next, told, lost };
})();
