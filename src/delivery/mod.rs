pub mod breaker;
pub mod scheduler;
pub mod verdict;
