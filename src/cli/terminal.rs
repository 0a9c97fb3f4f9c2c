//! This process's terminal, raw while a process in a guest has it.
//!
//! Invariant: it is restored on every way out, because what makes it raw
//! restores it when dropped.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use nix::sys::termios::{cfmakeraw, tcgetattr, tcsetattr, SetArg, Termios};

use super::output::{Failure, FAILED, USAGE};
use super::streams::in_background;
use crate::sys::terminal::window_size;

/// Rows and columns; `None` when standard input is no terminal.
pub fn size() -> Option<(u16, u16)> {
    window_size(io::stdin().as_fd()).ok()
}

/// This process's terminal.
pub struct Terminal {
    before: Termios,
}

impl Terminal {
    /// Standard input, which must be a terminal.
    pub fn open() -> Result<Terminal, Failure> {
        if !io::stdin().is_terminal() {
            return Err(Failure::new(USAGE, "--tty: standard input is no terminal"));
        }
        let before = tcgetattr(io::stdin())
            .map_err(|e| Failure::new(FAILED, format!("read the terminal's state: {e}")))?;
        Ok(Terminal { before })
    }

    /// Its rows and columns.
    pub fn size(&self) -> (u16, u16) {
        size().unwrap_or((24, 80))
    }

    /// Every key goes to the process from now on.
    pub fn raw(&self) -> Result<Raw, Failure> {
        self.set_raw().map_err(|e| Failure::new(FAILED, format!("make the terminal raw: {e}")))?;
        Ok(Raw { before: self.before.clone() })
    }

    /// Makes it raw again, after a shell has had it; not while another job has it.
    pub fn again(&self) {
        if !in_background(io::stdin().as_fd()) {
            let _ = self.set_raw();
        }
    }

    fn set_raw(&self) -> nix::Result<()> {
        let mut raw = self.before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)
    }
}

/// A raw terminal; restored when dropped.
pub struct Raw {
    before: Termios,
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before);
    }
}
