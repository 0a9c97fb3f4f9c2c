//! What a guest wrote to its console while it booted, for an error's text.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::dir::VmDir;
use crate::transport::socket::connect;
use crate::worker::Worker;

/// Bytes of the guest's console that an error carries, the last ones.
const KEPT_CONSOLE: usize = 2048;

/// How long a QEMU that has just been started may take to accept a client there.
const LISTENS: Duration = Duration::from_secs(5);

/// Keeps the end of what a guest writes to its console while it boots.
pub struct Console {
    stream: UnixStream,
    tail: Arc<Mutex<Vec<u8>>>,
    reader: Worker<()>,
}

impl Console {
    /// `None` when it can not be had: a boot does not fail for that.
    pub fn open(dir: &VmDir) -> Option<Console> {
        let stream = connect(&dir.console(), LISTENS).ok()?;
        let mut from = stream.try_clone().ok()?;
        let tail = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&tail);
        let reader = Worker::spawn("vmc-console", move || {
            let mut chunk = [0; 1024];
            while let Ok(n) = from.read(&mut chunk) {
                if n == 0 {
                    break;
                }
                let mut kept = kept.lock().unwrap_or_else(|e| e.into_inner());
                kept.extend_from_slice(&chunk[..n]);
                let over = kept.len().saturating_sub(KEPT_CONSOLE);
                kept.drain(..over);
            }
        })
        .ok()?;
        Some(Console { stream, tail, reader })
    }

    /// Stops reading: the end of what was written.
    pub fn close(self) -> String {
        let _ = self.stream.shutdown(Shutdown::Both);
        let _ = self.reader.join(Duration::from_secs(1));
        let tail = self.tail.lock().unwrap_or_else(|e| e.into_inner());
        String::from_utf8_lossy(&tail).into_owned()
    }
}
