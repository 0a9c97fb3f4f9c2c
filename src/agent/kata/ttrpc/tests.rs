//! Agents that answer with what nobody asked for: too late, too much, of another type, for
//! other calls.

use super::*;
use crate::worker::Worker;
use std::io::{Read, Write};
use std::time::Instant;

/// Until what should come at once.
const LONG: Duration = Duration::from_secs(20);
/// ttrpc's types of messages.
const RESPONSE: u8 = 2;

/// Reads a request: the number of its stream.
fn request(from: &mut UnixStream) -> u32 {
    let mut header = [0; 10];
    from.read_exact(&mut header).unwrap();
    let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut body = vec![0; number(0) as usize];
    from.read_exact(&mut body).unwrap();
    number(4)
}

fn message(stream: u32, kind: u8, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32).to_be_bytes();
    [&length[..], &stream.to_be_bytes(), &[kind, 0], body].concat()
}

/// A response whose payload is a ReadStreamResponse.
fn response(data: &[u8]) -> Vec<u8> {
    let field = |tag: u8, bytes: &[u8]| {
        let mut length = Vec::new();
        let mut n = bytes.len();
        while n > 0x7f {
            length.push(n as u8 | 0x80);
            n >>= 7;
        }
        length.push(n as u8);
        [&[tag][..], &length, bytes].concat()
    };
    field(0x12, &field(0x0a, data))
}

/// What one read gives when the agent answers so; `answer` is told the call's stream.
fn read(answer: impl FnOnce(u32, &mut UnixStream) + Send + 'static) -> Outcome<Vec<u8>> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let agent = KataAgent::over(ours).unwrap();
    let peer = Worker::spawn("test-agent", move || {
        let stream = request(&mut theirs);
        answer(stream, &mut theirs);
        // Until the client has gone.
        let _ = theirs.read(&mut [0; 1]);
    })
    .unwrap();
    let id = ProcessId { container: "c".into(), exec: String::new() };
    let before = Instant::now();
    let got = agent.read_stream(&id, Stream::Out, 4096);
    assert!(before.elapsed() < LONG);
    agent.hang_up();
    peer.join(LONG).unwrap();
    got
}

#[test]
fn answers_for_other_calls_are_nobodys() {
    let got = read(|stream, to| {
        for n in 0..20_000 {
            let other = stream.wrapping_add(2 + 2 * (n % 1000));
            if to.write_all(&message(other, RESPONSE, &[b'x'; 1000])).is_err() {
                return;
            }
        }
        let _ = to.write_all(&message(stream, RESPONSE, &response(b"mine")));
    });
    assert_eq!(got.unwrap(), b"mine");
}

#[test]
fn answers_of_another_type_are_errors() {
    let wrong: [fn(u32) -> Vec<u8>; 5] = [
        // A request, a type that there is none of, no protobuf, another message's fields.
        |stream| message(stream, 1, &response(b"x")),
        |stream| message(stream, 9, &response(b"x")),
        |stream| message(stream, RESPONSE, &[0xff; 100]),
        |stream| message(stream, RESPONSE, &[0x12, 3, 0x08, 0x80, 0x80]),
        // Longer than any message may be.
        |stream| {
            let head = message(stream, RESPONSE, &[]);
            [&0x0100_0000u32.to_be_bytes(), &head[4..], &[0; 0x0100_0000]].concat()
        },
    ];
    for (n, wrong) in wrong.into_iter().enumerate() {
        let got = read(move |stream, to| drop(to.write_all(&wrong(stream))));
        // The library tells of one that is too long as if the agent had.
        let error = matches!(got, Err(Error::Call { .. } | Error::Refused { .. }));
        assert!(error, "{n}: {got:?}");
    }
}

#[test]
fn an_answer_that_breaks_off_or_never_comes_is_an_error() {
    let got = read(|stream, to| {
        let whole = message(stream, RESPONSE, &response(b"mine"));
        let _ = to.write_all(&whole[..whole.len() - 1]);
        let _ = to.shutdown(Shutdown::Both);
    });
    assert!(matches!(got, Err(Error::Call { .. })), "{got:?}");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let agent = KataAgent::over(ours).unwrap();
    let before = Instant::now();
    let got = agent.check(Duration::from_millis(50));
    assert!(matches!(got, Err(Error::Call { .. })), "{got:?}");
    assert!(before.elapsed() < LONG);
    // Nor is anybody held who is hung up on.
    let (tell, told) = crossbeam_channel::bounded(1);
    let agent = Arc::new(agent);
    let waiting = Arc::clone(&agent);
    let call = Worker::spawn("test-call", move || {
        let _ = tell.send(());
        let id = ProcessId { container: "c".into(), exec: String::new() };
        waiting.wait_process(&id, None)
    })
    .unwrap();
    told.recv_timeout(LONG).unwrap();
    // It may not have asked yet: then it connects again, to nothing.
    agent.hang_up();
    assert!(call.join(2 * CALL).unwrap().is_err());
    drop(theirs);
}
