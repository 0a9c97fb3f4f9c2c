//! Frames of hyperstart's two channels.
//!
//! ```text
//! control:  code 4 | length 4 | payload      (JSON, mostly)
//! stream:   sequence 8 | length 4 | data     (no data: the end)
//! ```
//!
//! Numbers are big-endian; a length counts its header.
//!
//! Invariants: a frame from the guest that claims more than [`MAX_CONTROL`] or
//! [`MAX_STREAM`] bytes, or fewer than its header, ends the session; nothing that
//! would end the guest's PID 1 is ever sent: a stream frame has at most
//! [`MAX_DATA`] bytes of data.
//!
//! Source: hyperstart 1.1.0 (API 4244), src/api.h and src/event.c.

use std::io::{self, Read};

/// The version of the protocol that this speaks.
pub const API: u32 = 4244;
/// Longest control frame taken from a guest, in bytes.
pub const MAX_CONTROL: usize = 1024 * 1024;
/// Longest stream frame taken from a guest, in bytes.
pub const MAX_STREAM: usize = 128 * 1024;
/// Bytes of a stream frame's data that a guest can take, on a serial port.
pub const MAX_DATA: usize = 4084;
/// Bytes of a control message that are sent before the guest says NEXT.
pub const PIECE: usize = 512;

/// What a control frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // hyperstart's own names.
pub enum Code {
    GetVersion = 0,
    StartPod = 1,
    DestroyPod = 4,
    ExecCmd = 6,
    Ready = 8,
    Ack = 9,
    Error = 10,
    WinSize = 11,
    Ping = 12,
    Next = 14,
    WriteFile = 15,
    ReadFile = 16,
    NewContainer = 17,
    KillContainer = 18,
    OnlineCpuMem = 19,
    SetupInterface = 20,
    SetupRoute = 21,
    RemoveContainer = 22,
    ProcessAsyncEvent = 23,
    SignalProcess = 24,
    DeleteInterface = 25,
}

/// What a guest sends on the control channel.
#[derive(Debug, PartialEq, Eq)]
pub enum FromGuest {
    /// It has booted.
    Ready,
    /// It has read so many bytes.
    Next(u32),
    /// The oldest command that is not answered was carried out.
    Ack(Vec<u8>),
    /// It was not.
    Error(Vec<u8>),
    /// A process has ended.
    Event(Vec<u8>),
    /// Something of another version.
    Unknown(u32),
}

/// A control frame's bytes, by the number of its [`Code`].
pub fn control(code: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + payload.len());
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(&(8 + payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// A stream frame's bytes; of `data` at most [`MAX_DATA`].
pub fn stream(sequence: u64, data: &[u8]) -> Vec<u8> {
    let data = &data[..data.len().min(MAX_DATA)];
    let mut out = Vec::with_capacity(12 + data.len());
    out.extend_from_slice(&sequence.to_be_bytes());
    out.extend_from_slice(&(12 + data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

fn body(from: &mut impl Read, length: u32, header: usize, most: usize) -> io::Result<Vec<u8>> {
    let length = length as usize;
    if !(header..=most).contains(&length) {
        let text = format!("the guest sent a frame of {length} bytes ({header} to {most} can be)");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut data = vec![0; length - header];
    from.read_exact(&mut data)?;
    Ok(data)
}

/// Reads a control frame.
///
/// # Errors
/// At the end, and for a frame that can not be.
pub fn read_control(from: &mut impl Read) -> io::Result<FromGuest> {
    let mut h = [0; 8];
    from.read_exact(&mut h)?;
    let code = u32::from_be_bytes([h[0], h[1], h[2], h[3]]);
    let payload = body(from, u32::from_be_bytes([h[4], h[5], h[6], h[7]]), 8, MAX_CONTROL)?;
    Ok(match code {
        8 => FromGuest::Ready,
        9 => FromGuest::Ack(payload),
        10 => FromGuest::Error(payload),
        14 => {
            let n = payload.try_into().map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidData, "the guest sent NEXT without a number")
            })?;
            FromGuest::Next(u32::from_be_bytes(n))
        }
        23 => FromGuest::Event(payload),
        other => FromGuest::Unknown(other),
    })
}

/// Reads a stream frame: its sequence number and data.
///
/// # Errors
/// At the end, and for a frame that can not be.
pub fn read_stream(from: &mut impl Read) -> io::Result<(u64, Vec<u8>)> {
    let mut h = [0; 12];
    from.read_exact(&mut h)?;
    let mut sequence = [0; 8];
    sequence.copy_from_slice(&h[..8]);
    let length = u32::from_be_bytes([h[8], h[9], h[10], h[11]]);
    Ok((u64::from_be_bytes(sequence), body(from, length, 12, MAX_STREAM)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_that_can_not_be_are_refused() {
        for bad in [[0, 0, 0, 9, 0, 0, 0, 7], [0, 0, 0, 9, 0xff, 0xff, 0xff, 0xff]] {
            let e = read_control(&mut &bad[..]).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::InvalidData);
        }
        let mut short_next = control(Code::Next as u32, &[1, 2]);
        assert!(read_control(&mut &short_next[..]).is_err());
        short_next.truncate(9);
        let e = read_control(&mut &short_next[..]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
        let mut endless = stream(1, b"x");
        endless[8..].copy_from_slice(&[0xff; 5]);
        assert_eq!(read_stream(&mut &endless[..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(stream(1, &[0; 9000]).len(), 12 + MAX_DATA);
    }
}
