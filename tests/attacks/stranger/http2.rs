//! HTTP/2 by hand, as much as an attacker needs: frames, headers without compression, and a
//! reading of what comes back.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub const CONFIG: &str = "/cache.CacheService/Config";
pub const GET_BASE_VM: &str = "/cache.CacheService/GetBaseVM";
pub const STATUS: &str = "/vmcache.v1.Control/Status";

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// A length, with a prefix of seven bits (RFC 7541, 5.1).
fn length(mut n: usize) -> Vec<u8> {
    if n < 127 {
        return vec![n as u8];
    }
    let mut out = vec![127];
    n -= 127;
    while n >= 128 {
        out.push((n % 128 + 128) as u8);
        n /= 128;
    }
    out.push(n as u8);
    out
}

/// A field that is not indexed, or, with 0x40, is put into the table (RFC 7541, 6.2).
pub fn field(first: u8, name: &str, value: &str) -> Vec<u8> {
    let (n, v) = (length(name.len()), length(value.len()));
    [&[first][..], &n, name.as_bytes(), &v, value.as_bytes()].concat()
}

/// The header block of a call.
pub fn block(path: &str) -> Vec<u8> {
    // :method POST, :scheme http.
    let mut out = vec![0x83, 0x86];
    for (name, value) in [
        (":path", path),
        (":authority", "vmcache"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        out.extend(field(0, name, value));
    }
    out
}

/// HEADERS of a call, which stays open.
pub fn headers(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &block(path))
}

/// A whole call of nothing.
pub fn call(stream: u32, path: &str) -> Vec<u8> {
    [headers(stream, path), frame(DATA, END_STREAM, stream, &[0; 5])].concat()
}

/// A connection, and what was read of it.
pub struct Http {
    pub stream: UnixStream,
    pub next: u32,
    unread: Vec<u8>,
    /// Calls that were answered.
    pub answers: u64,
    /// SETTINGS of gRPC's.
    pub settings: u64,
    /// Why it is shut, when it was told.
    pub goaway: Option<String>,
    pub ended: bool,
}

impl Http {
    /// Connects, as whoever this thread is.
    pub fn connect(socket: &Path) -> std::io::Result<Http> {
        UnixStream::connect(socket).map(Http::over)
    }

    /// One that is connected.
    pub fn over(stream: UnixStream) -> Http {
        let _ = stream.set_write_timeout(Some(Duration::from_millis(300)));
        let unread = Vec::new();
        let (answers, settings, goaway, ended) = (0, 0, None, false);
        Http { stream, next: 1, unread, answers, settings, goaway, ended }
    }

    /// The same, with preface and SETTINGS.
    pub fn begin(socket: &Path) -> std::io::Result<Http> {
        let mut http = Http::connect(socket)?;
        http.say(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat());
        Ok(http)
    }

    /// The same, with the server's SETTINGS acknowledged.
    pub fn open(socket: &Path) -> std::io::Result<Http> {
        let mut http = Http::connect(socket)?;
        http.exchange_settings();
        Ok(http)
    }

    /// What both sides begin with.
    pub fn exchange_settings(&mut self) {
        self.say(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat());
        for _ in 0..100 {
            if self.settings > 0 || self.ended {
                break;
            }
            self.hear(Duration::from_millis(20));
        }
        self.say(&frame(SETTINGS, ACK, 0, &[]));
    }

    /// The number of the next call.
    pub fn id(&mut self) -> u32 {
        self.next += 2;
        self.next - 2
    }

    /// Sends; whether all of it went.
    pub fn say(&mut self, bytes: &[u8]) -> bool {
        let said = !self.ended && self.stream.write_all(bytes).is_ok();
        if !said {
            self.hear(Duration::from_millis(1));
            // What can not be written to any more is of no use, full or shut.
            self.ended = true;
        }
        said
    }

    /// Reads what there is, at most for so long.
    pub fn hear(&mut self, within: Duration) {
        let _ = self.stream.set_read_timeout(Some(within));
        let mut bytes = [0; 64 * 1024];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.ended = true,
            Ok(n) => self.unread.extend_from_slice(&bytes[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => self.ended = true,
        }
        let mut at = 0;
        while let Some(header) = self.unread.get(at..at + 9) {
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
            let (kind, flags) = (header[3], header[4]);
            let Some(payload) = self.unread.get(at + 9..at + 9 + length) else { break };
            match kind {
                // One that says nothing is the relay's, before it says goodbye.
                SETTINGS if flags & ACK == 0 && length > 0 => self.settings += 1,
                DATA | HEADERS if flags & END_STREAM != 0 => self.answers += 1,
                GOAWAY => {
                    let text = payload.get(8..).unwrap_or_default();
                    self.goaway = Some(String::from_utf8_lossy(text).into_owned());
                }
                _ => {}
            }
            at += 9 + length;
        }
        self.unread.drain(..at);
    }

    /// Reads to the end, or for so long; whether it has ended.
    pub fn ends(&mut self, within: Duration) -> bool {
        let until = std::time::Instant::now() + within;
        while !self.ended && std::time::Instant::now() < until {
            self.hear(Duration::from_millis(50));
        }
        self.ended
    }
}
