// The conversations that the browser keeps, each under a name of its own, so that a page writes nothing but the one that it shows:
// what another tab keeps is never overwritten. Where two tabs go on with the same one, it becomes two. What lies here is
// checked where it is shown (history.py).
window.kept = (() => {
  const MOST = 20; // conversations of a page, and characters of them together: a browser keeps about 5 MB a site
  const CHARACTERS = 500_000;
  const TITLE = 40; // characters
  const PICTURE = '[picture]';
  const seen = new Map(); // key -> { mark, text } of a conversation as this tab has read or written it last
  const moved = new Map(); // key -> that under which this tab goes on
  let listed = ''; // what the list of conversations was last made of

  const update = (values) => ({ __type__: 'update', ...values });
  const begin = (path) => `shoal-chat-${path}:`;
  const fresh = () => `${Date.now().toString(16)}${Math.random().toString(16).slice(2, 8)}`;
  const length = ({ messages }) => messages.reduce((sum, { text }) => sum + (text?.length ?? 0), 0);

  const read = (path, key) => {
    try {
      const chat = JSON.parse(localStorage.getItem(begin(path) + key));
      return Array.isArray(chat?.messages) && chat.messages.length ? { ...chat, id: key } : null;
    } catch {
      return null;
    }
  };

  // The newest first.
  const all = (path) => Object.keys(localStorage)
    .filter((name) => name.startsWith(begin(path)))
    .map((name) => read(path, name.slice(begin(path).length)))
    .filter((chat) => chat)
    .sort((one, other) => (other.at ?? 0) - (one.at ?? 0));

  const know = (chat) => { if (chat) seen.set(chat.id, { mark: chat.mark, text: JSON.stringify(chat.messages) }); };

  const drop = (path, chat) => localStorage.removeItem(begin(path) + chat.id);

  const write = (path, id, messages, at = Date.now()) => {
    const chat = { id, at, mark: fresh(), messages };
    for (;;) {
      try {
        localStorage.setItem(begin(path) + id, JSON.stringify(chat));
        break;
      } catch { // no room
        const oldest = all(path).filter((one) => one.id !== id).at(-1);
        if (!oldest) return;
        drop(path, oldest);
      }
    }
    know(chat);
    const chats = all(path);
    while (chats.length > 1 && (chats.length > MOST || chats.reduce((sum, one) => sum + length(one), 0) > CHARACTERS)) {
      drop(path, chats.pop());
    }
  };

  const title = ({ messages }) => {
    const text = String(messages[0].text ?? '').split(/\s+/).filter(Boolean).join(' ');
    return text.length > TITLE ? `${text.slice(0, TITLE)}…` : text || PICTURE;
  };

  // The list of conversations with `key` chosen; nothing where it is as it was: one that is open is not drawn anew.
  const list = (path, key) => {
    const choices = all(path).map((chat) => [title(chat), chat.id]);
    const value = choices.some(([, id]) => id === key) ? key : null;
    const now = JSON.stringify([value, choices]);
    if (now === listed) return update({});
    listed = now;
    return update({ choices, value });
  };

  // --- what Gradio calls, with the page's path first

  // The page opens: the last conversation, its key, and what an earlier version kept, which is taken over.
  const opened = (path, earlier) => {
    const old = Array.isArray(earlier) ? earlier.filter((chat) => typeof chat?.id === 'string' && Array.isArray(chat.messages)) : [];
    const now = Date.now(); // once: their order is what tells the newest
    old.forEach((chat, number) => { if (!read(path, chat.id)) write(path, chat.id, chat.messages, now - number); });
    if (old.length) localStorage.removeItem(`shoal-chats-${path}`);
    const last = all(path)[0];
    know(last);
    return [last ? JSON.stringify(last) : '', last?.id ?? fresh()];
  };

  // What is shown was made into `made`, a conversation to keep. `current`: the key of the one that is shown by now.
  const save = (path, made, current) => {
    if (!made) return [current, update({})];
    const { id: key, messages } = JSON.parse(made);
    let id = moved.get(key) ?? key;
    const known = seen.get(id);
    const before = read(path, id);
    const ours = before?.mark === known?.mark;
    if (JSON.stringify(messages) === known?.text || (!messages.length && !ours)) return [current, list(path, current)];
    if (!messages.length) {
      localStorage.removeItem(begin(path) + id);
      seen.delete(id);
      return [current, list(path, current)];
    }
    if (before && !ours) { // another tab went on with it
      id = fresh();
      moved.set(key, id);
    }
    write(path, id, messages);
    const now = current === key ? id : current;
    return [now, list(path, now)];
  };

  // Another one is picked.
  const choose = (path, _, key) => {
    const chat = read(path, key);
    moved.delete(key);
    know(chat);
    return [chat ? JSON.stringify(chat) : '', key];
  };

  const anew = (path) => {
    const key = fresh();
    return [[], key, list(path, key)];
  };

  const show = (path, current) => list(path, current);

  return { opened, save, choose, anew, show };
})();
