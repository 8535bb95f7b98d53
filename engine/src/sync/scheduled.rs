//! Locks whose every step is a point where shuttle may let another thread go on.

use super::Event;
use shuttle::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;

/// A mutex without poisoning: a panic ends the schedule anyway.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lock for many readers or one writer.
#[derive(Debug)]
pub(crate) struct RwLock<T>(shuttle::sync::RwLock<T>);

impl<T> RwLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(shuttle::sync::RwLock::new(value))
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A mutex that a future waits for. Whoever comes first takes it: more orders than a fair one has.
#[derive(Debug)]
pub(crate) struct AsyncMutex<T> {
    value: shuttle::sync::Mutex<T>,
    freed: Event,
}

/// What the mutex guards, until dropped.
#[derive(Debug)]
pub(crate) struct AsyncMutexGuard<'a, T> {
    /// Taken only by `drop`.
    guard: Option<MutexGuard<'a, T>>,
    freed: &'a Event,
}

impl<T> AsyncMutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            value: shuttle::sync::Mutex::new(value),
            freed: Event::default(),
        }
    }

    pub(crate) async fn lock(&self) -> AsyncMutexGuard<'_, T> {
        self.freed.wait_for(|| self.try_lock()).await
    }

    pub(crate) fn try_lock(&self) -> Option<AsyncMutexGuard<'_, T>> {
        let guard = self.value.try_lock().ok()?;
        Some(AsyncMutexGuard {
            guard: Some(guard),
            freed: &self.freed,
        })
    }
}

impl<T: Default> Default for AsyncMutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

#[expect(clippy::expect_used, reason = "only `drop` takes the guard")]
impl<T> Deref for AsyncMutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.guard.as_deref().expect("held until dropped")
    }
}

#[expect(clippy::expect_used, reason = "only `drop` takes the guard")]
impl<T> DerefMut for AsyncMutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.guard.as_deref_mut().expect("held until dropped")
    }
}

impl<T> Drop for AsyncMutexGuard<'_, T> {
    fn drop(&mut self) {
        drop(self.guard.take());
        self.freed.notify_all();
    }
}
