// Sees to it that what is asked is answered. Gradio's client (6.31) asks by POST and reads all answers in one stream, which the
// server ends when none is due. What the client asks before it has read of that end gets no stream; and it leaves a stream when the
// page is about to go, though it may stay, which makes the server forget what is due. So the client reads a stream of ours: it goes
// on while an answer is due, through as many of the server's as that takes, and only the end of the page ends those early.
(() => {
  const plain = window.fetch;
  const encoder = new TextEncoder();
  const due = new Set(); // ids of answers that are not complete
  const early = new Set(); // ids of answers that were complete before the reply to their question came
  let stream; // that the client reads: { out: its controller, left: resolves when the client takes it for ended }
  let following = false; // whether the server's streams are being read
  let noticed; // resolves when the client knows of the last end

  const tell = (message) => stream.out.enqueue(encoder.encode(`${message}\n\n`));

  const ask = async (request) => {
    const reply = await plain(request);
    if (reply.ok) {
      const { event_id: id } = await reply.clone().json();
      if (!early.delete(id)) due.add(id);
    }
    await noticed; // else the client would look for the answer in a stream that has ended
    return reply;
  };

  // Passes one of the server's streams on, but for the message that it has ended.
  const passOn = () => {
    let rest = '';
    let ended = false;
    return new WritableStream({
      write(text) {
        const messages = (rest + text).split('\n\n');
        rest = messages.pop();
        for (const message of messages) {
          const { msg, event_id: id } = JSON.parse(message.replace('data: ', ''));
          if (msg === 'process_completed' && !due.delete(id)) early.add(id);
          ended = msg === 'close_stream';
          if (!ended) tell(message);
        }
      },
      close() {
        if (!ended) throw new TypeError('the stream of answers was cut off');
      },
    });
  };

  const follow = async (request) => {
    following = true;
    try {
      while (due.size) {
        const { ok, status, body } = await plain(request);
        if (!ok) throw new TypeError(`no stream of answers: status ${status}`);
        await body.pipeThrough(new TextDecoderStream()).pipeTo(passOn());
      }
      tell('data: {"msg": "close_stream"}');
      stream.out.close();
      noticed = stream.left;
    } catch (error) {
      stream.out.error(error);
    }
    following = false;
  };

  window.fetch = async (resource, options) => {
    const { pathname } = new URL(resource.url ?? resource, location.href);
    if (pathname.endsWith('/queue/join')) return ask(new Request(resource, options));
    if (!pathname.endsWith('/queue/data')) return plain(resource, options);
    const { signal } = resource;
    Object.defineProperty(resource, 'signal', { value: null }); // by which the client would stop reading
    const left = new Promise((resolve) => signal.addEventListener('abort', resolve));
    const body = new ReadableStream({ start: (out) => { stream = { out, left }; } });
    if (!following) follow(new Request(resource, { signal: null }));
    return new Response(body);
  };
})();
